"""Rows 6, 7 and 8 of the matrix, together: a minute of what evidence does for an hour (test_mixed_load.py there)."""

from pathlib import Path

import pytest
from mixed_load import mixed_load

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_minute_of_mixed_load_leaks_nothing(tiny_bundle: Path, tiny: Recipe, ray_cluster: None, clip: bytes) -> None:
    found = mixed_load(tiny_bundle, tiny, clip, seconds=60)
    print(found.figures())
    found.check()
