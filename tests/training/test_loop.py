import logging

import pytest
import torch
from learnt_weights import assert_same, weights

from speechgpt.training.config import EngineSection, LoraSection

LORA = LoraSection(rank=2, alpha=4, dropout=0.3)


def test_the_loss_falls_and_is_reported_with_rate_and_speed(trained):
    _, store = trained(steps=24, log_every=8, checkpoint_every=100)
    curve = [figures for figures in store.figures if "loss" in figures]
    assert [figures["step"] for figures in curve] == [8, 16, 24]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert all(figures["tokens_per_second"] > 0 and figures["learning_rate"] > 0 for figures in curve)
    assert {"loss_text", "loss_units"} <= curve[0].keys()


# Dropout makes the random state count: a resume that forgot it would differ.
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(trained, zero_stage, lora):
    section = EngineSection(workers=1, zero_stage=zero_stage)
    unbroken, _ = trained("unbroken", section, lora=lora)
    trained("broken", section, until=6, lora=lora)
    resumed, store = trained("broken", section, lora=lora)
    assert [figures["step"] for figures in store.figures] == [8, 8]
    assert_same(unbroken, resumed)


def test_a_notice_gives_a_checkpoint_out_of_turn_from_which_training_goes_on(trained):
    unbroken, _ = trained("unbroken")
    notices = iter([False, True])
    trained("broken", until=1, leaving=lambda: next(notices, False), checkpoint_every=100)
    resumed, store = trained("broken", checkpoint_every=100)
    assert [place.name for place in sorted(store.root.iterdir())] == ["step-002", "step-008"]
    assert store.figures[0]["step"] == 4, "training goes on from step 2"
    assert_same(unbroken, resumed)


def test_accumulation_gives_the_step_of_one_large_batch(trained):
    large, _ = trained("large", micro_batch=4, steps=4)
    accumulated, _ = trained("accumulated", micro_batch=2, accumulation=2, steps=4)
    one, other = weights(large), weights(accumulated)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "missing", "unfinished"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(trained, caplog, damage):
    unbroken, _ = trained("unbroken")
    _, store = trained("broken", until=6)
    newest = store.root / "step-006"
    shard = next(newest.rglob("*optim_states.pt"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    else:
        (newest / "part-0.json").unlink()
    with caplog.at_level(logging.WARNING, logger="speechgpt.training.checkpoints"):
        resumed, after = trained("broken")
    assert after.figures[0]["step"] == 4, "training goes on from step 3"
    assert "step-006 skipped" in caplog.text
    assert_same(unbroken, resumed)


def test_too_few_blocks_are_named_before_training(trained):
    with pytest.raises(ValueError, match="40 steps of 2 blocks need 80, not 64"):
        trained(steps=40)
