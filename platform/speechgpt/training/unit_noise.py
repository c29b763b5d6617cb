"""Units that are heard, not learnt, changed as another throat or room would change them."""

import numpy as np

_NEIGHBOURS = 8
"""Of the nearest units, one is drawn for a changed one."""


class UnitNoise:
    """Puts near units in the place of some that a row only listens to.

    A voice that training never heard has its words in units beside the ones that training knows them by: a model that
    only ever saw the right ones takes each for a message. What the loss weighs (`weights > 0`) stays as it is.
    """

    def __init__(self, centroids: np.ndarray, first_unit: int, share: float) -> None:
        """centroids: float [units, dimensions]; first_unit: token id of unit 0; share: of heard units, to change."""
        count = min(_NEIGHBOURS, len(centroids) - 1)
        square = (centroids**2).sum(1)
        distance = square[:, None] + square - 2 * centroids @ centroids.T
        np.fill_diagonal(distance, np.inf)
        self._near = np.argpartition(distance, count - 1, axis=1)[:, :count]
        self._first, self._share = first_unit, share

    def __call__(self, ids: np.ndarray, weights: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Token ids (int32 [tokens]) of one row, changed. No two equal units come to stand side by side."""
        units = ids - self._first
        changed = (weights == 0) & (units >= 0) & (units < len(self._near)) & (draw.random(len(ids)) < self._share)
        # Not two in a row: then the neighbours of a changed unit are what they were, and can be compared with.
        changed[1:] &= ~changed[:-1]
        places = np.flatnonzero(changed)
        noisy = ids.copy()
        noisy[places] = self._first + self._near[units[places], draw.integers(self._near.shape[1], size=len(places))]
        doubled = np.flatnonzero(noisy[1:] == noisy[:-1])
        touched = np.union1d(doubled, doubled + 1)
        noisy[touched] = ids[touched]
        return noisy
