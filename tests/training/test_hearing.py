"""The order in which an encoder's clips are heard."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.training import hearing


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
