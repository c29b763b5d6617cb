"""When one voice says what another one says: dynamic time warping over the frames of two clips."""

import numpy as np

_STEP = 0.1
"""Cost of a frame of one clip that has no frame of its own in the other, in cosine distance."""


def align(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of my frames the one of theirs that says the same: int [n], rising. mine: [n, D]; theirs: [m, D]."""
    distance = 1 - _normed(mine) @ _normed(theirs).T
    n, m = distance.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    # A diagonal depends on the two before it only, and so is one operation.
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        alone = np.minimum(total[i - 1, j], total[i, j - 1]) + _STEP
        total[i, j] = distance[i - 1, j - 1] + np.minimum(total[i - 1, j - 1], alone)
    path = np.empty(n, np.int64)
    i, j = n, m
    while i > 0:
        # Where the way turns left along a row, the leftmost frame is kept.
        path[i - 1] = j - 1
        step = np.argmin((total[i - 1, j - 1], total[i - 1, j] + _STEP, total[i, j - 1] + _STEP))
        i, j = i - (step != 2), j - (step != 1)
    return path


def _normed(frames: np.ndarray) -> np.ndarray:
    wide = frames.astype(np.float32)
    return wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-9)
