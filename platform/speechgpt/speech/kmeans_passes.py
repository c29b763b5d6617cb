"""k-means over frames that do not fit into memory: Lloyd's passes as sums, which may be taken in parts and places.

Whoever holds frames turns them into a `Partial` for given centroids, block by block; partials add up, and `fit` moves
the centroids. The start and the rule by which it stops are scikit-learn's.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from speechgpt.speech.codebook import Codebook, CodebookError

_CHUNK = 1 << 15
"""Frames whose distances to all centroids are held at once."""
_TOLERANCE = 1e-4
"""Of the frames' variance: a smaller move of the centroids is none."""


class Partial(NamedTuple):
    """What a pass needs to know of some frames."""

    sums: np.ndarray
    """Of the frames nearest to each centroid, float64 [K, D]."""
    counts: np.ndarray
    """How many they are, int64 [K]."""
    inertia: float
    """Sum of squared distances to the nearest centroid."""
    far: np.ndarray
    """The frames that are farthest from theirs, at most K, float32 [n, D], the farthest first."""
    far_distances: np.ndarray
    """Their squared distances, float32 [n]."""
    far_units: np.ndarray
    """Their centroids, int64 [n]."""


def partial(blocks: Iterable[np.ndarray], centroids: np.ndarray) -> Partial:
    """blocks: float32 [N, D] each, of any length; centroids: float32 [K, D]. Holds a block and 32,768 x K distances."""
    book = torch.from_numpy(centroids)
    half_squares = book.square().sum(1) / 2
    total = _nothing(centroids)
    for block in blocks:
        for first in range(0, len(block), _CHUNK):
            frames = torch.from_numpy(np.array(block[first : first + _CHUNK], np.float32))
            nearest, units = (frames @ book.T - half_squares).max(1)
            distances = (frames.square().sum(1) - 2 * nearest).clamp(min=0)
            sums = torch.zeros(book.shape, dtype=torch.float64).index_add_(0, units, frames.double())
            counts = torch.bincount(units, minlength=len(book))
            far = distances.topk(min(len(book), len(frames))).indices
            found = Partial(
                sums.numpy(),
                counts.numpy(),
                float(distances.double().sum()),
                frames[far].numpy(),
                distances[far].numpy(),
                units[far].numpy(),
            )
            total = added([total, found])
    return total


def added(parts: list[Partial]) -> Partial:
    """One partial of all, in their order."""
    clusters = len(parts[0].counts)
    distances = np.concatenate([part.far_distances for part in parts])
    far = np.argsort(-distances, kind="stable")[:clusters]
    return Partial(
        np.sum([part.sums for part in parts], axis=0),
        np.sum([part.counts for part in parts], axis=0),
        float(sum(part.inertia for part in parts)),
        np.concatenate([part.far for part in parts])[far],
        distances[far],
        np.concatenate([part.far_units for part in parts])[far],
    )


def start(sample: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """k-means++ on a sample, float32 [N, D]. Raises CodebookError if it has fewer frames than there are clusters."""
    from sklearn.cluster import kmeans_plusplus

    if len(sample) < clusters:
        raise CodebookError(
            f"{len(sample)} frames cannot make {clusters} clusters; give more audio or a smaller codebook.clusters"
        )
    centroids, _ = kmeans_plusplus(sample.astype(np.float64), clusters, random_state=seed)
    return centroids.astype(np.float32)


def fit(
    centroids: np.ndarray,
    one_pass: Callable[[np.ndarray], Partial],
    iterations: int,
    variance: float,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Codebook, dict]:
    """Passes until the centroids stay, at most `iterations`, and one that counts.

    centroids: float32 [K, D] to start from. one_pass: the Partial of all frames. variance: of the frames, mean over
    their dimensions. Returns the codebook and a report: frames, inertia per frame, its course, passes, dead units.
    """
    course: list[float] = []
    for _ in range(iterations):
        found = one_pass(centroids)
        course.append(found.inertia / max(int(found.counts.sum()), 1))
        moved = _moved(centroids, found)
        shift = float(np.square(moved.astype(np.float64) - centroids).sum())
        centroids = moved
        advance()
        if shift <= _TOLERANCE * variance:
            break
    last = one_pass(centroids)
    frames = int(last.counts.sum())
    course.append(last.inertia / max(frames, 1))
    report = {
        "frames": frames,
        "inertia": course[-1],
        "iterations": len(course) - 1,
        "dead_units": int((last.counts == 0).sum()),
        "inertia_course": [round(each, 6) for each in course],
    }
    return Codebook(torch.from_numpy(centroids)), report


def _moved(centroids: np.ndarray, found: Partial) -> np.ndarray:
    """Means; a centroid without frames goes to one of the frames that are farthest from theirs, as in scikit-learn."""
    sums, counts = found.sums.copy(), found.counts.copy()
    empty = np.flatnonzero(counts == 0)
    for unit, frame, distance, old in zip(empty, found.far, found.far_distances, found.far_units, strict=False):
        if distance > 0 and counts[old] > 1:
            sums[old] -= frame
            counts[old] -= 1
            sums[unit], counts[unit] = frame, 1
    means = sums / np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, means, centroids).astype(np.float32)


def _nothing(centroids: np.ndarray) -> Partial:
    clusters, dimensions = centroids.shape
    return Partial(
        np.zeros((clusters, dimensions)),
        np.zeros(clusters, np.int64),
        0.0,
        np.zeros((0, dimensions), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
    )
