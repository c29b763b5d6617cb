"""Nothing leaks under all kinds of requests at once: memory, files, threads, actors, work that nobody waits for.

`SPEECHGPT_MIXED_LOAD_MINUTES` says how long; an hour if it does not. A minute of the same stands in
tests/serve/test_mixed_load.py.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mixed_load import mixed_load

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

MINUTES = float(os.environ.get("SPEECHGPT_MIXED_LOAD_MINUTES", "60"))


def test_an_hour_of_mixed_load_leaks_nothing(
    tiny_bundle: Path, tiny: Recipe, ray_cluster: None, clip: bytes, record_property: Callable[[str, object], None]
) -> None:
    """Text, sound both ways, streams, refusals and clients who vanish, for an hour: no process of the service grows."""
    found = mixed_load(tiny_bundle, tiny, clip, seconds=MINUTES * 60)
    record_property("minutes", MINUTES)
    for name, value in found.figures().items():
        record_property(name, value)
    found.check()
