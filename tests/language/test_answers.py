"""Only what was generated counts, and only if it is whole is it well-formed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.language.answers import PARTS, Answer, parse
from speechgpt.language.prompts import Exchange, answer_template, fill, question_template
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.segments import find_marker, write
from speechgpt.language.vocabulary import Vocabulary

PUBLISHED = json.loads(Path(__file__).with_name("published_rows.json").read_text())["fixtures"]
CHAIN = next(fixture for fixture in PUBLISHED if fixture["kind"] == "chain_of_modality")
PRINTED = next(fixture for fixture in PUBLISHED if fixture["kind"] == "cli_tts_answer_as_printed")
VOCABULARIES = {
    markers: Vocabulary.grow(train_tokenizer(["what is two plus three"], 300), 1000, markers)
    for markers in ("released", "whole")
}
UNMERGED = Vocabulary.grow(train_tokenizer(["what is two"], 300), 1000, "whole", merged=False)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip)
# A text's own last semicolons cannot be told from the template's.
words = words.filter(lambda text: text and find_marker(text) is None and not text.endswith(";"))


@pytest.mark.parametrize("markers", ["released", "whole"])
@pytest.mark.parametrize("dialect", ["released", "paper"])
@pytest.mark.parametrize("kind", list(PARTS))
@pytest.mark.parametrize("as_text", [True, False])
def test_every_kind_of_answer_is_read(kind, dialect, markers, as_text):
    vocabulary = VOCABULARIES[markers]
    exchange = Exchange(kind, "what is two", "it is two", (5, 6), (7, 8, 7), "Say it.")
    generated = write(fill(dialect, exchange)).split("[SpeechGPT]:")[1]
    skipped = question_template(dialect, kind).split("[SpeechGPT]:")[1].strip()
    generated = generated.strip().removeprefix(skipped)
    answer = parse(generated if as_text else vocabulary.encode(generated), vocabulary, kind)
    assert answer == Answer(
        "what is two" if "transcript" in PARTS[kind] else None,
        "it is two" if "text" in PARTS[kind] else None,
        [7, 8, 7] if "units" in PARTS[kind] else None,
        True,
        "stop",
    )


@pytest.mark.parametrize("markers", ["released", "whole"])
@given(question=words, text=words)
def test_any_words_come_back(markers, question, text):
    vocabulary = VOCABULARIES[markers]
    generated = answer_template("paper", "s2s").format(question=question, answer=text, answer_units="<sosp><1><eosp>")
    assert parse(vocabulary.encode(generated), vocabulary, "s2s") == Answer(question, text, [1], True, "stop")


def test_the_published_chain():
    answer = parse(CHAIN["plain_text"].split("[SpeechGPT]: ")[1], VOCABULARIES["released"], "s2s")
    assert answer.transcript == "What is a bad term for poop?"
    assert answer.text is not None and answer.text.startswith("A bad term for poop is excrement.")
    assert answer.units is not None and len(answer.units) == 185
    assert answer.well_formed


def test_the_answer_as_the_published_command_line_printed_it():
    """Spaces between units, and no `<eoa>` because it printed what was before it."""
    answer = parse(PRINTED["text"], VOCABULARIES["released"], "speak")
    assert answer.units is not None and len(answer.units) == PRINTED["n_units"][0]
    assert (answer.text, answer.finish) == (None, "length")


@pytest.mark.parametrize(
    ("generated", "kind", "wrong"),
    [
        ("[tq] a; [ta] b; [ua] <sosp><1><2>", "s2s", "cut within the speech"),
        ("[tq] a; [ta] b; [ua] <sosp><1><2><eosp>", "s2s", "no end"),
        ("[tq] a; [ta] b; [ua] <sosp><1><1><eosp><eoa>", "s2s", "adjacent duplicates"),
        ("[tq] a; [ta] b; [ua] <sosp><eosp><eoa>", "s2s", "no units"),
        ("[tq] a; [ta] b; [ua] <1><2><eoa>", "s2s", "units outside speech"),
        ("[tq] a; [ta] b; [ua] <sosp>no<1><eosp><eoa>", "s2s", "words inside speech"),
        ("[tq] a; [ta] b; [ua] <sosp><1><eosp> c <eoa>", "s2s", "words after speech"),
        ("[tq] a; [ta] b; [ua] <sosp><1><eosp><sosp><2><eosp><eoa>", "s2s", "two stretches of speech"),
        ("[tq] a; [ta] b <eoa>", "s2s", "no speech"),
        ("[tq] a; [tq] b; [ta] c <eoa>", "s2t", "two transcripts"),
        ("[ta] b <eoa>", "s2t", "no transcript"),
        ("[tq] a; [ta] b <eoa>", "transcribe", "answers instead of transcribing"),
        ("[tq] [ta] b <eoa>", "s2t", "an empty transcript"),
        ("[ta] [Human]: more <eoa>", "t2t", "asks itself"),
        ("", "t2t", "nothing"),
    ],
)
@pytest.mark.parametrize("markers", ["released", "whole"])
def test_what_is_not_well_formed(generated, kind, wrong, markers):
    vocabulary = VOCABULARIES[markers]
    assert not parse(vocabulary.encode(generated), vocabulary, kind).well_formed, wrong


def test_partial_replies_give_what_is_there():
    vocabulary = VOCABULARIES["whole"]
    ids = vocabulary.encode("[tq] what is two; [ta] it is two; [ua] <sosp><1><2><eosp><eoa>")
    answers = [parse(ids[:length], vocabulary, "s2s") for length in range(len(ids))]
    assert all(answer.finish == "length" and not answer.well_formed for answer in answers)
    assert [len(answer.units or []) for answer in answers][-4:] == [0, 1, 2, 2]


def test_what_follows_the_end_is_not_read():
    vocabulary = VOCABULARIES["whole"]
    ids = vocabulary.encode("[ta] it is two<eoa>. [ua] <sosp><1><eosp>")
    assert parse(ids, vocabulary, "t2t") == Answer(None, "it is two", None, True, "stop")


def test_unmerged_units_may_repeat():
    ids = UNMERGED.encode("<sosp><1><1><2><eosp><eoa>")
    assert parse(ids, UNMERGED, "speak") == Answer(None, None, [1, 1, 2], True, "stop")


def test_a_marker_that_the_model_only_spells_is_text():
    vocabulary = VOCABULARIES["whole"]
    ids = [vocabulary.ta, *vocabulary.encode_plain("say [ua] <sosp><1><eosp> <eoa>"), vocabulary.eoa]
    assert parse(ids, vocabulary, "t2t") == Answer(None, "say [ua] <sosp><1><eosp> <eoa>", None, True, "stop")


def test_a_unit_outside_the_codebook_is_an_error():
    with pytest.raises(ValueError, match="outside the codebook"):
        parse("<sosp><1000><eosp><eoa>", VOCABULARIES["whole"], "speak")
