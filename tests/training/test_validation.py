import math

import pytest
import torch
from learnt_weights import assert_same, weights

from speechgpt.training import blocks, validation
from speechgpt.training.config import EngineSection, LoraSection, StageSection
from speechgpt.training.validation import LOSS, Standing, Validation, standing

# Dropout, so that a look which drew a random number would be seen in what is learnt.
LORA = LoraSection(rank=2, alpha=4, dropout=0.3)


class Notes:
    """A diary in memory that counts its writings."""

    def __init__(self) -> None:
        self.looks: dict = {}
        self.written = 0

    def read(self) -> dict:
        return self.looks

    def write(self, looks) -> None:
        self.looks, self.written = {step: dict(figures) for step, figures in looks.items()}, self.written + 1


def test_of_equal_losses_the_earliest_is_the_best_and_no_number_is_none():
    assert standing({0: 3.0, 2: 2.0, 4: 2.0, 6: 2.5}) == Standing(2, 2)
    assert standing({0: math.nan, 2: 9.0}) == Standing(2, 0)
    assert standing({0: 1.0}) == Standing(0, 0)


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="validate_every"):
        StageSection(mixture={"text": 1}, steps=1, learning_rate=1, patience=2)
    with pytest.raises(ValueError, match="validate_every"):
        StageSection(mixture={"text": 1}, steps=1, learning_rate=1, leave="best")


@pytest.fixture
def watched(trained, block_file):
    """`trained` with a validation on the stage's own blocks; gives engine, store, validation and the kept steps."""

    def run(root="run", diary=None, section=None, until=None, **changes):
        kept: dict[int, dict] = {}
        made = []

        def keep(engine, step: int) -> None:
            kept[step] = weights(engine)

        def watch(settings):
            made.append(Validation({"": blocks.Blocks(block_file)}, settings, diary or Notes(), keep))
            return made[0]

        engine, store = trained(root, section, until, watch=watch, **changes)
        return engine, store, made[0], kept

    return run


def test_the_held_out_loss_is_the_mean_over_all_targets(watched, block_file):
    engine, store, look, _ = watched(steps=4, validate_every=2)
    assert sorted(look.looks) == [0, 2, 4]
    whole = blocks.Blocks(block_file)
    with torch.no_grad():
        losses = engine.module(whole.read(range(len(whole))))
    text, units = float(losses.text / losses.text_tokens), float(losses.units / losses.unit_tokens)
    found = look.looks[4]
    assert found[LOSS] == pytest.approx(float(losses.weighted) / float(whole.weight.sum()), rel=1e-5)
    assert found[f"{LOSS}_text"] == pytest.approx(text, rel=1e-5)
    assert found[f"{LOSS}_units"] == pytest.approx(units, rel=1e-5)
    assert found["validation_perplexity_units"] == pytest.approx(math.exp(units), rel=1e-4)
    told = [figures for figures in store.figures if LOSS in figures]
    assert [figures["step"] for figures in told] == [0, 2, 4]


def test_a_rank_with_nothing_left_adds_nothing(watched, block_file):
    engine, _, _, _ = watched(steps=2, validate_every=2)
    settings = StageSection(mixture={"text": 1}, steps=1, learning_rate=1, micro_batch=5, validate_every=1)
    uneven = validation.measured(engine, blocks.Blocks(block_file), settings)
    even = validation.measured(engine, blocks.Blocks(block_file), settings.model_copy(update={"micro_batch": 64}))
    assert uneven == pytest.approx(even, rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_looking_changes_nothing_in_what_is_learnt(trained, watched, lora):
    alone, _ = trained("alone", lora=lora)
    looked_at, *_ = watched("looked-at", lora=lora, validate_every=1)
    assert_same(alone, looked_at)


def test_a_stage_ends_when_patience_does_and_the_best_is_kept(watched):
    # So high a rate makes it worse and worse.
    engine, store, look, kept = watched(
        steps=8, learning_rate=3.0, schedule="constant", validate_every=1, patience=2, leave="best"
    )
    best, last = look.standing.best_step, max(look.looks)
    assert last == best + 2 < 8
    assert max(kept) == best
    # It ends with a checkpoint, off the beat or on it.
    assert (store.root / f"step-{last:03}").is_dir()
    assert store.figures[-1]["step"] == last
    assert any(not torch.equal(kept[best][name], value) for name, value in weights(engine).items())


@pytest.mark.parametrize("until", [3, 4])
def test_a_broken_stage_stops_where_the_unbroken_one_does(watched, until):
    settings = dict(
        steps=8, learning_rate=3.0, schedule="constant", validate_every=1, patience=4, checkpoint_every=1, warmup=0.0
    )
    unbroken, _, straight, _ = watched("unbroken", **settings)
    stops = max(straight.looks)
    diary = Notes()
    watched("broken", diary, until=until, **settings)
    # The killed attempt may have looked once more than its last checkpoint knows.
    diary.looks[until + 1] = {LOSS: -1.0}
    resumed, _, look, _ = watched("broken", diary, **settings)
    assert look.looks == straight.looks and max(look.looks) == stops < 8
    assert_same(unbroken, resumed)
    # Once more, after its end: nothing is left to do.
    again, store, look, _ = watched("broken", diary, **settings)
    assert look.stopped and not any("loss" in figures for figures in store.figures)
    assert_same(unbroken, again)


def test_zero_three_is_validated_too(watched):
    _, _, look, _ = watched(section=EngineSection(workers=1, zero_stage=3), steps=2, validate_every=1)
    _, _, plain, _ = watched("plain", section=EngineSection(workers=1, zero_stage=0), steps=2, validate_every=1)
    for step in (0, 1, 2):
        assert look.looks[step][LOSS] == pytest.approx(plain.looks[step][LOSS], abs=1e-5)
