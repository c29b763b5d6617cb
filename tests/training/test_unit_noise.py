import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.training.unit_noise import UnitNoise

_UNITS, _FIRST = 20, 100
# On a line: the neighbours of a unit are those with the next numbers.
_CENTROIDS = np.arange(_UNITS, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)


def _row(length: int, seed: int) -> np.ndarray:
    """Units without repeats."""
    steps = np.random.default_rng(seed).integers(1, _UNITS, length)
    return (_FIRST + np.cumsum(steps) % _UNITS).astype(np.int32)


@given(st.integers(1, 200), st.integers(0, 2**20), st.floats(0, 1))
def test_only_heard_units_change_to_near_ones_and_never_repeat(length, seed, share):
    ids, draw = _row(length, seed), np.random.default_rng(seed)
    weights = draw.integers(0, 2, length).astype(np.float32)
    noisy = UnitNoise(_CENTROIDS, _FIRST, share)(ids, weights, draw)
    assert (noisy[weights > 0] == ids[weights > 0]).all()
    assert np.abs(noisy - ids).max() <= 8
    assert (noisy[1:] != noisy[:-1]).all()
    assert noisy.dtype == ids.dtype


def test_about_that_share_is_changed():
    ids, draw = _row(20_000, 1), np.random.default_rng(1)
    noisy = UnitNoise(_CENTROIDS, _FIRST, 0.1)(ids, np.zeros(len(ids), np.float32), draw)
    assert (noisy != ids).mean() == pytest.approx(0.085, abs=0.015)


def test_words_stay_as_they_are():
    ids = np.array([3, _FIRST + 4, _FIRST + _UNITS, 7], np.int32)
    noisy = UnitNoise(_CENTROIDS, _FIRST, 1.0)(ids, np.zeros(4, np.float32), np.random.default_rng(0))
    assert noisy[[0, 2, 3]].tolist() == ids[[0, 2, 3]].tolist()
    assert noisy[1] != ids[1]


def test_the_same_seed_gives_the_same_row():
    noise, ids, weights = UnitNoise(_CENTROIDS, _FIRST, 0.3), _row(300, 2), np.zeros(300, np.float32)
    first, second = (noise(ids, weights, np.random.default_rng((1, 7))) for _ in range(2))
    assert first.tolist() == second.tolist() != ids.tolist()
