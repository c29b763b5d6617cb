"""The text-to-unit model: it learns a script that is easy, resumes to the same bits, and writes only units."""

from itertools import islice

import pytest
import torch

from speechgpt.language.text_to_unit import TextToUnit, TextToUnitError
from speechgpt.training.config import TextToUnitSection
from speechgpt.training.text_to_unit import Pair, batch_plan, examples, loss, measure, rate_at, scratch, train

SECTION = TextToUnitSection(
    text_vocabulary=270,
    architecture={
        "d_model": 48,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    steps=200,
    batch_tokens=160,
    learning_rate=4e-3,
    label_smoothing=0.0,
)
WORDS = {"bee": (1, 2, 3), "sea": (4, 5), "honey": (6, 7, 8, 9), "is": (10, 11), "sweet": (12, 13, 14)}


def pairs() -> list[Pair]:
    """Each word has its own units, so that two words in a row have theirs in a row."""
    return [Pair(f"{a} {b}", WORDS[a] + WORDS[b]) for a in WORDS for b in WORDS if a != b]


def steps(maker: TextToUnit, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    data, _ = examples(maker, pairs())
    plan = islice(batch_plan([len(each.target) for each in data], SECTION.batch_tokens, 1), first, None)
    made = train(maker.model, optimizer, data, plan, SECTION, pad=0, start=2, seed=1, first_step=first)
    return [done.loss for done in islice(made, last - first)]


def fresh() -> tuple[TextToUnit, torch.optim.Optimizer]:
    maker = scratch(SECTION, [pair.text for pair in pairs()], 16, seed=3)
    return maker, torch.optim.AdamW(maker.model.parameters(), lr=1e-3)


def test_it_learns_to_write_and_is_measured(tmp_path):
    maker, optimizer = fresh()
    before = measure(maker, pairs()[:10], SECTION)
    losses = steps(maker, optimizer, 0, SECTION.steps)
    after = measure(maker, pairs()[:10], SECTION)
    assert losses[-1] < 0.2 < losses[0]
    assert after["unit_loss"] < before["unit_loss"] / 4
    assert after["unit_error_rate"] < 0.1 and after["unfinished"] == 0
    assert 0.9 < after["length_ratio"] < 1.1

    maker.save(tmp_path)
    again = TextToUnit.load(tmp_path)
    texts = ["Bee, sea!", "honey is", "", "!!!", "sea"]
    written = again.write(texts)
    assert written == maker.write(texts)
    assert written[2] == written[3] == (), "what has no words is not spoken"
    assert written[1] == WORDS["honey"] + WORDS["is"]
    assert [again.write([text])[0] for text in texts] == written
    beams = again.write(texts[:2], beams=3)
    assert beams[1] == written[1]
    assert again.write(["honey is"], max_units=4) == [()], "what does not end is not taken for whole"


def test_a_resumed_training_equals_an_unbroken_one():
    whole, optimizer = fresh()
    steps(whole, optimizer, 0, 12)
    first, optimizer = fresh()
    steps(first, optimizer, 0, 5)
    state = {"model": first.model.state_dict(), "optimizer": optimizer.state_dict()}
    second, optimizer = fresh()
    second.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps(second, optimizer, 5, 12)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_padding_changes_no_loss():
    maker, _ = fresh()
    maker.model.eval()
    data, left_out = examples(maker, [*pairs()[:3], Pair("bee " * 80, (1, 2)), Pair("bee", tuple([1, 2] * 40))])
    assert len(data) == 3 and left_out == 2
    short, long = data[0], examples(maker, [Pair("honey sweet honey sweet", WORDS["honey"] * 4)])[0][0]
    with torch.no_grad():
        alone = [loss(maker.model, [each], 0, 2, 0.1).item() * len(each.target) for each in (short, long)]
        together = loss(maker.model, [short, long], 0, 2, 0.1).item() * (len(short.target) + len(long.target))
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_batches_hold_every_example_once_an_epoch_and_no_more_tokens_than_asked_for():
    lengths = [3, 50, 7, 7, 8, 20, 21, 90, 4, 5] * 5
    seen: list[int] = []
    for batch in batch_plan(lengths, 60, 1):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60
        seen += batch
        if len(seen) == len(lengths):
            break
    assert sorted(seen) == list(range(len(lengths)))


def test_without_an_example_there_is_an_error_and_no_endless_search():
    with pytest.raises(ValueError, match="max_position_embeddings"):
        next(batch_plan([], 60, 1))


def test_the_rate_rises_falls_and_ends():
    section = TextToUnitSection(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [rate_at(step, section) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1
    assert rates[-1] == pytest.approx(1 / 90)


def test_another_directory_is_named(tmp_path):
    with pytest.raises(TextToUnitError, match=r"no text_to_unit\.json"):
        TextToUnit.load(tmp_path)
