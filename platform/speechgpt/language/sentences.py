"""Long text as the pieces in which a model says it, one after the other."""

import re
from collections.abc import Iterator

_MOST_WORDS = 35
"""SpeechInstruct's answers are shorter (Zhang et al. 2023, §3.2): more at once was never spoken in training."""
_ENDS = (re.compile(r"(?<=[.!?;:…])\s+"), re.compile(r"(?<=,)\s+"))


def sayable(text: str, most: int = _MOST_WORDS) -> list[str]:
    """Pieces of at most so many words, as few as go, cut between sentences; within one only where it is too long, at
    commas first. Text that fits stays as it is."""
    pieces: list[str] = []
    for part in _parts(text, most, _ENDS):
        if pieces and _words(pieces[-1]) + _words(part) <= most:
            pieces[-1] = f"{pieces[-1]} {part}"
        else:
            pieces.append(part)
    return pieces


def _parts(text: str, most: int, ends: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    if _words(text) <= most:
        yield text
    elif ends:
        for part in ends[0].split(text):
            yield from _parts(part, most, ends[1:])
    else:
        words = text.split()
        for start in range(0, len(words), most):
            yield " ".join(words[start : start + most])


def _words(text: str) -> int:
    return len(text.split())
