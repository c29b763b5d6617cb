"""Discrete units: merging of repeats, and the notation `<sosp><661><987>…<eosp>` (SPEC 0)."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

START, END = "<sosp>", "<eosp>"
_UNIT = re.compile(r"<(\d+)>")


class Units(NamedTuple):
    """Merged units of one clip. Both arrays are int16 [n]; durations count frames of 20 ms."""

    units: np.ndarray
    durations: np.ndarray


def merge(frames: Sequence[int] | np.ndarray) -> Units:
    """Collapse runs of equal units ("reduced units", SPEC 1.1) and keep each run's length.

    Raises ValueError for a run of more frames than int16 counts: eleven minutes of one sound.
    """
    frames = np.asarray(frames, dtype=np.int16)
    if not len(frames):
        return Units(frames, frames.copy())
    starts = np.flatnonzero(np.r_[True, frames[1:] != frames[:-1]])
    lengths = np.diff(np.r_[starts, len(frames)])
    if lengths.max() > np.iinfo(np.int16).max:
        raise ValueError(f"one unit lasts {lengths.max()} frames, more than a clip of speech holds of one sound")
    return Units(frames[starts], lengths.astype(np.int16))


def expand(units: Units) -> np.ndarray:
    """The frame-level units that `merge` was given. int16 [frames]."""
    return np.repeat(units.units, units.durations)


def format_units(units: Iterable[int]) -> str:
    """`<sosp><u1><u2>…<eosp>`, without spaces."""
    return START + "".join(f"<{int(u)}>" for u in units) + END


def parse_units(text: str, size: int | None = None) -> list[int]:
    """All units written in `text`, spaced or not. Raises ValueError for one outside a codebook of `size`."""
    units = [int(u) for u in _UNIT.findall(text)]
    if size is not None and (wrong := [u for u in units if u >= size]):
        raise ValueError(f"unit <{wrong[0]}> is outside the codebook of {size} units")
    return units
