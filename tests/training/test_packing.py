from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.training.packing import OPEN_BLOCKS, pack, plan


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(64, 200))
def test_blocks_hold_whole_rows_and_no_more_than_fits(lengths, block):
    for rows in islice(plan(cycle(range(len(lengths))), lengths, block), 20):
        assert 0 < sum(lengths[row] for row in rows) <= block


def test_no_drawn_row_is_lost():
    lengths = [7, 20, 31, 50, 64]
    draws = [number % 5 for number in range(2000)]
    planned = [row for rows in plan(draws, lengths, 64) for row in rows]
    # Only what the open blocks still held when the draws ended is missing.
    assert 0 <= len(draws) - len(planned) <= OPEN_BLOCKS * 64 // 7
    assert {row: planned.count(row) for row in range(4)}[0] == pytest.approx(400, abs=OPEN_BLOCKS * 9)


def test_little_room_is_left_over():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 200, 500).tolist()
    rows = list(islice(plan(cycle(range(500)), lengths, 512), 200))
    assert sum(lengths[row] for part in rows for row in part) / (200 * 512) > 0.97


def test_a_row_longer_than_a_block_is_refused_and_not_cut():
    with pytest.raises(ValueError, match="row 1 has 65 tokens"):
        list(plan([0, 1], [5, 65], 64))


def test_a_block_has_positions_from_zero_in_each_row_and_in_the_padding():
    rows = [(np.array([5, 6, 7]), np.array([0, 1, 0.5])), (np.array([8, 9]), np.array([1, 1]))]
    block = pack(rows, 8, pad_id=2)
    assert block.ids.tolist() == [5, 6, 7, 8, 9, 2, 2, 2]
    assert block.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    # The last token of one row must not be taught to predict the first of the next.
    assert block.weights.tolist() == [0, 1, 0.5, 0, 1, 0, 0, 0]
    assert block.tokens == 5
