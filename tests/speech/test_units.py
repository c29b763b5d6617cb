import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.speech.units import expand, format_units, merge, parse_units

frames = st.lists(st.integers(0, 999), max_size=200)


@given(frames)
def test_expand_undoes_merge(run: list[int]) -> None:
    merged = merge(run)
    assert expand(merged).tolist() == run
    assert (merged.units[1:] != merged.units[:-1]).all()
    assert merged.durations.sum() == len(run)


@given(frames)
def test_parse_undoes_format(units: list[int]) -> None:
    assert parse_units(format_units(units), size=1000) == units


def test_the_published_notation() -> None:
    assert format_units([661, 987]) == "<sosp><661><987><eosp>"
    assert parse_units("<sosp> <661> <987> <eosp> ") == [661, 987]


def test_a_unit_outside_the_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="<500>"):
        parse_units("<sosp><3><500><eosp>", size=500)


def test_long_runs_keep_their_length() -> None:
    assert merge(np.full(3000, 7)).durations.tolist() == [3000]


def test_a_run_that_int16_cannot_count_is_refused_and_not_wrapped() -> None:
    assert merge(np.zeros(32_767, int)).durations.tolist() == [32_767]
    with pytest.raises(ValueError, match="one unit lasts 32768 frames"):
        merge(np.zeros(32_768, int))
