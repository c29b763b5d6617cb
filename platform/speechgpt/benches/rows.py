"""Rows of the lengths that SpeechInstruct's have, of random tokens: speed does not ask what they say."""

from typing import Literal, NamedTuple

import numpy as np

RowLengths = Literal["crossmodal", "chain"]
UNITS_A_SECOND = 29
TEXT_TOKENS_A_SECOND = 3.5
"""About 2.7 words of read English, 1.3 tokens each."""
PREFIX, DESCRIPTION = 100, 20
"""Tokens of the published prefix, which is not learnt, and of a description of the task with its markers."""


class Rows(NamedTuple):
    """Rows as both sides take them: token ids (int32) and loss weights (float32, 0 for the prefix), each [tokens]."""

    rows: list[tuple[np.ndarray, np.ndarray]]
    block: int
    """Longest row, in tokens, as the authors' scripts set it; longer ones are cut there, and so they are here."""
    batch: int
    """Rows that the authors' script has in one micro-batch of one GPU."""
    cut: int
    """Rows that were longer."""


def draw(kind: RowLengths, count: int, vocabulary: int, seed: int) -> Rows:
    """`count` rows. The same arguments give the same rows.

    crossmodal: clips of 1 to 17 s, evenly in the logarithm, which has the mean of the published corpus (5.6 s: 14,000
    hours are 9 million pairs). chain: 250 to 400 tokens and the prefix.
    """
    rng = np.random.default_rng(seed)
    if kind == "crossmodal":
        seconds = np.exp(rng.uniform(0, np.log(17), count))
        lengths = PREFIX + DESCRIPTION + np.round(seconds * (UNITS_A_SECOND + TEXT_TOKENS_A_SECOND)).astype(int)
        block, batch = 512, 6
    else:
        lengths = PREFIX + rng.integers(250, 401, count)
        block, batch = 1024, 12
    rows = []
    for length in np.minimum(lengths, block):
        weights = np.ones(length, np.float32)
        weights[:PREFIX] = 0
        # 0, 1 and 2 are padding and the ends of text.
        rows.append((rng.integers(3, vocabulary, length, dtype=np.int32), weights))
    return Rows(rows, block, batch, int((lengths > block).sum()))
