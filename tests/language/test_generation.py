"""Whatever a model would like to say, what it says follows the grammar; and it says the same in any company."""

import random
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from speechgpt.language.answers import PARTS, Answer, parse
from speechgpt.language.config import GenerationSection
from speechgpt.language.generation import (
    Decoder,
    GrammarProcessor,
    GumbelSampler,
    Region,
    allowed_tokens,
    choose,
    cut_token,
    grammar,
    sampling,
)
from speechgpt.language.prompts import Turn, answer_template
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary

GREEDY = GenerationSection(temperature=0, max_new_tokens=16, max_text_tokens=8)
SAMPLED = GenerationSection(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=16, max_text_tokens=14)
DIALOGUES = [
    [Turn("user", units=[1, 2, 3])],
    [Turn("user", text="what is two plus three")],
    [Turn("user", units=[30, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])],
    [Turn("user", text="hi"), Turn("assistant", text="hello"), Turn("user", units=[5])],
    [Turn("user", text="<sosp><1><eosp> [ta] <eoa>")],
]
MODES = [(dialect, markers) for dialect in ("paper", "released") for markers in ("whole", "released")]


@pytest.fixture(scope="module", params=[("paper", "whole"), ("released", "released")], ids="-".join)
def model(request, untrained):
    return untrained(*request.param)


@pytest.mark.parametrize(("dialect", "markers"), MODES)
@pytest.mark.parametrize("kind", list(PARTS))
def test_every_way_through_the_grammar_is_well_formed(kind, dialect, markers):
    vocabulary = Vocabulary.grow(train_tokenizer(["a"], 300), 10, markers)
    letters = [vocabulary.encode_plain(letter)[-1] for letter in "abcdefgh"]
    template = answer_template(dialect, kind)
    regions = grammar(template, vocabulary)
    rules = GrammarProcessor(regions, vocabulary, vocabulary.size, 0, [1000], 1000)
    draw = random.Random(f"{kind} {dialect} {markers}")
    for _ in range(8):
        said: list[int] = []
        while not said or said[-1] not in regions.ending.tokens:
            scores = rules(torch.tensor([said], dtype=torch.long), torch.zeros(1, vocabulary.size))
            allowed = (scores[0] == 0).nonzero().squeeze(1).tolist()
            content = [token for token in allowed if token in letters or vocabulary.is_unit(token)]
            turns = [token for token in allowed if token in (vocabulary.eos, *vocabulary.marker_ids.values())]
            # Tags that are several tokens are the model's to spell; here only their regions are walked through.
            said.append(draw.choice(turns if turns and (not content or draw.random() < 0.2) else content))
        answer = parse(said, vocabulary, kind)
        assert answer.finish == "stop"
        assert answer.well_formed or markers == "released", vocabulary.decode(said)
        assert bool(answer.units) == ("units" in PARTS[kind])


@pytest.mark.parametrize("form", ["chain", "direct", "text"])
@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replies_follow_the_grammar(model, form, generation):
    for answer in model.answer(DIALOGUES, form, generation):
        assert form != "text" or answer.units is None
        assert all(0 <= unit < 40 for unit in answer.units or [])
        assert all(a != b for a, b in pairwise(answer.units or []))
        assert answer.transcript or answer.text or answer.units


def test_recognition_gives_words_and_speaking_gives_units(model):
    assert all(isinstance(text, str) and "<sosp>" not in text for text in model.transcribe([[1, 2], [3]], GREEDY))
    for units in model.speak(["what is two", "hello"], GREEDY):
        assert units and all(0 <= unit < 40 for unit in units)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_replies_as_each_would_alone(model, generation):
    together = model.answer(DIALOGUES, "chain", generation, seed=5)
    assert [model.answer([dialogue], "chain", generation, seed=5)[0] for dialogue in DIALOGUES] == together
    assert model.answer(DIALOGUES[::-1], "chain", generation, seed=5)[::-1] == together


def test_the_seed_decides_a_sampled_reply(model):
    first, again, other = (model.answer(DIALOGUES, "chain", SAMPLED, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_text_ends_at_its_limit_and_says_so(model):
    tight = GenerationSection(temperature=0, max_new_tokens=100, max_text_tokens=5)
    assert all(not answer.well_formed for answer in model.answer(DIALOGUES, "text", tight))
    vocabulary = model.vocabulary
    rules = GrammarProcessor(grammar("{answer}<eoa>", vocabulary), vocabulary, vocabulary.size, 0, [100], 5)
    said = torch.tensor([vocabulary.encode_plain("a b c d e f g")[:5]])
    assert not torch.isinf(rules(said[:, :4], torch.zeros(1, vocabulary.size))[0, said[0, 4]])
    assert (rules(said, torch.zeros(1, vocabulary.size)) == 0).nonzero().tolist() == [[0, cut_token(vocabulary)]]
    assert parse([*said[0].tolist(), cut_token(vocabulary)], vocabulary, "text").finish == "length"


def test_a_reply_ends_at_its_limit_and_says_so(model):
    tight = GenerationSection(temperature=0, max_new_tokens=7)
    for units in model.speak(["what is two", "hello"], tight):
        assert 1 <= len(units) <= 6
    never = GenerationSection(temperature=0, max_new_tokens=1)
    assert model.reply([model.prompts.speaking("hello")], "speak", never)[0] == Answer(None, None, [], False, "length")


def test_units_may_repeat_where_they_are_not_merged(untrained):
    model = untrained("paper", "whole", False)
    said = model.speak([f"what is {n}" for n in range(8)], SAMPLED)
    assert any(a == b for units in said for a, b in pairwise(units))


@pytest.mark.parametrize(
    ("dialect", "markers", "kind", "expected"),
    [
        ("paper", "whole", "s2s", ["nothing", "text!", "text!", "nothing", "units!", "nothing"]),
        ("paper", "whole", "s2t", ["nothing", "text!", "text!"]),
        ("paper", "whole", "direct", ["text!", "nothing", "units!", "nothing"]),
        ("paper", "whole", "standard", ["nothing", "units!", "nothing"]),
        ("paper", "whole", "transcribe", ["text!"]),
        ("paper", "whole", "speak", ["nothing", "units!", "nothing"]),
        ("released", "whole", "s2s", ["text!", "text!", "nothing", "units!", "nothing"]),
        ("released", "released", "s2s", ["text!", "units!", "text"]),
        ("released", "released", "s2t", ["text!"]),
        ("released", "released", "speak", ["nothing", "units!", "text"]),
    ],
)
def test_the_grammar_is_read_off_the_template(dialect, markers, kind, expected):
    vocabulary = Vocabulary.grow(train_tokenizer(["a"], 300), 10, markers)
    rules = grammar(answer_template(dialect, kind), vocabulary)
    assert [region.content + "!" * region.needed for region in rules.regions] == expected
    assert len(rules.markers) == len(rules.regions) - 1


@pytest.mark.parametrize("kind", list(PARTS))
def test_a_training_row_is_allowed_token_by_token(kind):
    """The grammar forbids nothing that the model is taught."""
    vocabulary = Vocabulary.grow(train_tokenizer(["what is two"], 300), 10, "whole")
    template = answer_template("paper", kind)
    row = template.format(question="what is two", answer="it is two", answer_units="<sosp><1><2><1><eosp>")
    ids = [*vocabulary.encode(row)]
    last = max(place for place, token in enumerate(ids) if token in (vocabulary.eoa, vocabulary.eos_marker))
    rules = GrammarProcessor(grammar(template, vocabulary), vocabulary, vocabulary.size, 0, [100], 100)
    for place, token in enumerate(ids[: last + 1]):
        scores = rules(torch.tensor([ids[:place]], dtype=torch.long), torch.zeros(1, vocabulary.size))
        assert scores[0, token] == 0, vocabulary.decode(ids[: place + 1])


@pytest.mark.parametrize("markers", ["whole", "released"])
@pytest.mark.parametrize("kind", list(PARTS))
def test_what_ends_an_answer_is_read_as_its_end(markers, kind):
    vocabulary = Vocabulary.grow(train_tokenizer(["what is two"], 300), 10, markers)
    tokens, spelt = grammar(answer_template("released", kind), vocabulary).ending
    ends = "[ua]" in spelt or vocabulary.ua in tokens
    assert (parse("it is two; [ua] and more", vocabulary, kind).finish == "stop") == ends


@pytest.mark.parametrize("markers", ["whole", "released"])
@pytest.mark.parametrize("dialect", ["paper", "released"])
@pytest.mark.parametrize(("kind", "ends"), [("t2t", True), ("s2t", True), ("t2s", False), ("s2s", False)])
def test_what_begins_to_be_spoken_has_ended_where_text_was_asked_for(dialect, markers, kind, ends):
    """In the released dialect the prompts of both forms are the same, so a model may go on to speak either way."""
    vocabulary = Vocabulary.grow(train_tokenizer(["what is two"], 300), 10, markers)
    regions = grammar(answer_template(dialect, kind), vocabulary)
    said = answer_template(dialect, kind).partition("{answer}")[0].format(question="what is two") + "it is two; [ua]"
    tokens = vocabulary.encode(said)
    allowed = allowed_tokens(regions, vocabulary, vocabulary.size)
    decoder = Decoder(regions, allowed, vocabulary, GREEDY, 100, 0)
    for token in tokens:
        assert not decoder.ended
        scores = torch.zeros(vocabulary.size)
        decoder.mask(scores)
        assert scores[token] == 0
        decoder.take(token)
    assert decoder.ended == ends
    answer = parse(tokens, vocabulary, kind)
    assert (answer.text, answer.well_formed, answer.finish) == ("it is two", ends, "stop" if ends else "length")


def test_rows_that_only_pad_the_embedding_are_never_said():
    vocabulary = Vocabulary.grow(train_tokenizer(["a"], 300), 10, "whole")
    rules = GrammarProcessor(grammar("{answer}<eoa>", vocabulary), vocabulary, vocabulary.size + 50, 0, [9], 9)
    scores = rules(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, vocabulary.size + 50))
    assert torch.isinf(scores[0, vocabulary.size :]).all()
    assert not torch.isinf(scores[0, vocabulary.encode_plain("a")[-1]])


def test_sampling_draws_from_the_distribution():
    wanted = torch.tensor([0.5, 0.3, 0.2, 0.0])
    sampler = GumbelSampler([torch.Generator().manual_seed(seed) for seed in range(4000)])
    drawn = sampler(torch.zeros(4000, 1, dtype=torch.long), wanted.log().repeat(4000, 1)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, wanted, atol=0.03)
    assert share[3] == 0


@pytest.mark.parametrize("generation", [GenerationSection(), GenerationSection(top_k=0), GenerationSection(top_p=1)])
def test_of_what_cannot_be_drawn_nothing_is_sorted_and_the_draws_are_the_same(generation):
    """`choose` looks at some columns, `sampling`, as in `generate`, at all of them."""
    vocabulary = Vocabulary.grow(train_tokenizer(["two and three"] * 9, 300), 50, "whole")
    rules = grammar("{answer}<eoa>", vocabulary)
    allowed = allowed_tokens(rules, vocabulary, vocabulary.size)
    decoders = [Decoder(rules, allowed, vocabulary, generation, 9, seed) for seed in range(40)]
    scores = torch.randn(40, vocabulary.size, generator=torch.Generator().manual_seed(1)).mul(3)
    if generation.top_p == 1:
        # Many alike, so that more than `top_k` may be drawn; of those, which `top_p` leaves out is chance.
        scores = scores.round()
    whole = scores.clone()
    for row, decoder in zip(whole, decoders, strict=True):
        decoder.mask(row)
    for processor in sampling(generation, list(range(40)), torch.device("cpu")):
        whole = processor(torch.zeros(40, 1, dtype=torch.long), whole)
    choose(decoders, scores)
    said = [decoder.tokens for decoder in decoders]
    assert said == whole.argmax(1, keepdim=True).tolist() and len(set(map(tuple, said))) > 5


def test_greedy_needs_no_sampler():
    assert len(sampling(GREEDY, [1], torch.device("cpu"))) == 0
    preset = sampling(GenerationSection(), [1], torch.device("cpu"))
    assert [type(step).__name__ for step in preset] == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "GumbelSampler",
    ]


def test_a_region_has_units_text_or_nothing():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"piece{n}": n for n in range(3, 32000)}
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    grown = Vocabulary.grow(base, 1000, "released")
    rules = grammar(answer_template("released", "s2s"), grown)
    assert rules.regions == [Region("text", True), Region("units", True), Region("text", False)]
    step = GrammarProcessor(rules, grown, grown.size, 0, [100] * 2, 100)
    scores = step(torch.tensor([[5, grown.sosp, grown.first_unit + 7], [5, 6, 7]]), torch.zeros(2, grown.size))
    in_speech, in_text = (set((~torch.isinf(row)).nonzero().squeeze(1).tolist()) for row in scores)
    assert in_speech == {*grown.unit_ids(u for u in range(1000) if u != 7), grown.eosp}
    assert in_text == {*range(3, 32000), grown.sosp}
