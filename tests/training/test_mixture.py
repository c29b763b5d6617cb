from collections import Counter
from itertools import islice

import pytest

from speechgpt.training.mixture import draw

KINDS = ["text"] * 100 + ["units"] * 50 + ["s2s"] * 10
CATEGORIES = ["sums"] * 90 + ["capitals"] * 10 + ["voice-a"] * 40 + ["voice-b"] * 10 + ["sums"] * 10


def test_kinds_come_in_the_proportions_of_the_mixture():
    drawn = Counter(KINDS[row] for row in islice(draw(KINDS, CATEGORIES, {"text": 3, "units": 1}, seed=1), 20_000))
    assert set(drawn) == {"text", "units"}
    assert drawn["text"] / drawn["units"] == pytest.approx(3, rel=0.05)


def test_categories_of_text_come_evenly_and_those_of_units_by_size():
    rows = list(islice(draw(KINDS, CATEGORIES, {"text": 1, "units": 1}, seed=1), 10_000))
    text = Counter(CATEGORIES[row] for row in rows if KINDS[row] == "text")
    units = Counter(CATEGORIES[row] for row in rows if KINDS[row] == "units")
    assert abs(text["sums"] - text["capitals"]) <= 1
    assert units["voice-a"] / units["voice-b"] == pytest.approx(4, rel=0.05)


def test_every_row_comes_before_any_comes_again():
    rows = list(islice(draw(KINDS, CATEGORIES, {"units": 1}, seed=3), 150))
    for epoch in (rows[:50], rows[50:100], rows[100:]):
        assert sorted(epoch) == list(range(100, 150))
    assert rows[:50] != rows[50:100]


def test_the_seed_alone_decides_the_order():
    def first(seed: int) -> list[int]:
        return list(islice(draw(KINDS, CATEGORIES, {"text": 1, "s2s": 1}, seed), 500))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_a_kind_without_rows_is_named():
    with pytest.raises(ValueError, match=r"no rows of kind \['t2t'\].*'s2s', 'text', 'units'"):
        next(draw(KINDS, CATEGORIES, {"t2t": 1}, seed=1))
