"""The loop in which an encoder learns, whatever it is asked: the order of its clips, and going on where it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learnt_weights import assert_same
from small_encoder import ARCHITECTURE, steps, under_zero

from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.speech.hubert import HubertFeatures, frame_count, scratch
from speechgpt.training import checkpoints, hearing, masked_prediction
from speechgpt.training.distillation import Student
from speechgpt.training.ledger import Ledger


def pieces_of(sizes: list[int]) -> list[np.ndarray]:
    bounds = np.cumsum([0, *sizes])
    return [np.arange(*pair) for pair in zip(bounds, bounds[1:], strict=False)]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=80),
    world=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_clip_is_heard_once_an_epoch_by_one_rank(sizes: list[int], world: int, seed: int) -> None:
    section = EncoderTrainingSection(batch_seconds=4.0)
    seconds = np.random.default_rng(seed).uniform(0.5, 3.0, sum(sizes))
    heard: list[int] = []
    for rank in range(world):
        epoch: list[int] = []
        plan = hearing.batch_plan(seconds, pieces_of(sizes), section, seed, rank, world)
        order = np.random.default_rng((seed, 0)).permutation(len(sizes))[rank::world]
        while len(epoch) < sum(sizes[piece] for piece in order):
            batch = next(plan)
            assert len(batch) == 1 or max(seconds[batch]) * len(batch) <= section.batch_seconds + 0.001 * len(batch)
            epoch += batch
        heard += epoch
    assert sorted(heard) == list(range(sum(sizes)))


def test_the_order_is_the_seeds_and_so_is_that_of_another_epoch() -> None:
    section = EncoderTrainingSection(batch_seconds=4.0)
    seconds = np.random.default_rng(0).uniform(0.5, 3.0, 50)
    pieces = pieces_of([5] * 10)

    def begin(seed: int, skipped: int = 0) -> list[list[int]]:
        return list(islice(hearing.batch_plan(seconds, pieces, section, seed), skipped, skipped + 60))

    assert begin(5) == begin(5) != begin(6)
    one_epoch = next(n for n in range(1, 61) if sum(map(len, begin(5)[:n])) == 50)
    assert begin(5, one_epoch)[:5] != begin(5)[:5]


def test_a_window_of_pieces_is_left_before_the_next_is_begun() -> None:
    """So that a worker holds no more of the corpus than that."""
    section = EncoderTrainingSection(batch_seconds=4.0)
    pieces = pieces_of([3] * (5 * hearing.WINDOW))
    order: list[int] = []
    for batch in islice(hearing.batch_plan(np.ones(15 * hearing.WINDOW), pieces, section, 0), 500):
        order += [number // 3 for number in batch]
        if len(order) == 15 * hearing.WINDOW:
            break
    windows = [set(order[first : first + 3 * hearing.WINDOW]) for first in range(0, len(order), 3 * hearing.WINDOW)]
    assert [len(window) for window in windows] == [hearing.WINDOW] * 5


def test_more_ranks_than_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pieces of a corpus for 3 workers"):
        next(hearing.batch_plan([1.0] * 4, pieces_of([2, 2]), EncoderTrainingSection(), 0, 0, 3))


def test_what_fails_ahead_of_time_fails_in_its_turn() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise OSError("disk")
        return step

    found: list[int] = []
    with pytest.raises(OSError, match="disk"):
        for made in hearing._ahead(make, range(9)):
            found.append(made)
    assert found == [0, 1, 2]


def learner(section: EncoderTrainingSection) -> Any:
    """Under DeepSpeed, always the same at first."""
    torch.manual_seed(0)
    if section.objective == "distil":
        return under_zero(Student(HubertFeatures(scratch(ARCHITECTURE, 0), -1, True), 3), section)
    features = HubertFeatures(scratch(masked_prediction.architecture(section, ARCHITECTURE), 0), -1, True)
    return under_zero(masked_prediction.MaskedPredictor(features, 3, section.masked), section)


@pytest.mark.parametrize("objective", ["distil", "masked"])
@pytest.mark.parametrize("augment", [0.0, 0.7])
def test_a_resumed_training_ends_in_the_same_weights(
    tmp_path: Path, objective: Literal["distil", "masked"], augment: float
) -> None:
    """With dropout, and with clips that are changed."""
    draw = np.random.default_rng(0)
    clips = [
        hearing.Clip(draw.standard_normal(16_000).astype(np.float32), draw.integers(3, size=frame_count(16_000)))
        for _ in range(8)
    ]
    section = EncoderTrainingSection(objective=objective, steps=6, batch_seconds=4.8, augment=augment)
    unbroken = learner(section)
    for done in steps(unbroken, clips, section):
        if done.step == 3:
            checkpoints.save(unbroken, tmp_path, done.step, Ledger())

    class Store:
        def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
            yield nullcontext(tmp_path)

    resumed = learner(section)
    first = checkpoints.restore(resumed, Store(), Ledger())
    assert first == 3
    torch.manual_seed(99)
    list(steps(resumed, clips, section, first))
    assert_same(unbroken, resumed)
