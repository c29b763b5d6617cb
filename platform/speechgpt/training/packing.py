"""Rows of tokens into blocks of one length, so that no step computes on padding."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

OPEN_BLOCKS = 32
"""Blocks that are filled side by side: enough that little room is left over, few enough that draws stay in order."""


class Block(NamedTuple):
    """One packed block; every array is [block]."""

    ids: np.ndarray
    """int32 token ids; the tail is padding."""
    weights: np.ndarray
    """float32 weight of each token as a target; 0 for a row's first token, its prefix and padding."""
    positions: np.ndarray
    """int32, from 0 in each row: transformers takes a fall as a border between rows that no attention crosses."""
    tokens: int
    """Tokens that are not padding."""


def plan(draws: Iterable[int], lengths: Sequence[int], block: int) -> Iterator[list[int]]:
    """Yield, block by block, the numbers of the rows in it; their lengths add up to at most `block` tokens.

    A drawn row goes into the fullest open block that has room for it. Rows longer than a block must not be drawn.
    """
    filling: list[tuple[int, list[int]]] = []
    for number in draws:
        length = lengths[number]
        if length > block:
            raise ValueError(f"row {number} has {length} tokens and does not fit a block of {block}")
        fits = [place for place, (used, _) in enumerate(filling) if used + length <= block]
        if fits:
            place = max(fits, key=lambda candidate: filling[candidate][0])
            used, rows = filling[place]
            filling[place] = (used + length, [*rows, number])
        else:
            filling.append((length, [number]))
        if len(filling) > OPEN_BLOCKS:
            fullest = max(range(len(filling)), key=lambda candidate: filling[candidate][0])
            yield filling.pop(fullest)[1]


def pack(rows: Sequence[tuple[np.ndarray, np.ndarray]], block: int, pad_id: int) -> Block:
    """Join rows (token ids, weights) into one block of `block` tokens."""
    ids = np.full(block, pad_id, dtype=np.int32)
    weights = np.zeros(block, dtype=np.float32)
    positions = np.zeros(block, dtype=np.int32)
    start = 0
    for row_ids, row_weights in rows:
        end = start + len(row_ids)
        if end > block:
            raise ValueError(f"rows of {sum(len(r) for r, _ in rows)} tokens do not fit a block of {block}")
        ids[start:end] = row_ids
        weights[start:end] = row_weights
        # Nothing before a row predicts its first token.
        weights[start] = 0
        positions[start:end] = np.arange(len(row_ids))
        start = end
    positions[start:] = np.arange(block - start)
    return Block(ids, weights, positions, start)
