"""Text as the pieces in which a model says it, one after the other."""

import re
from collections.abc import Iterator

_MOST_WORDS = 35
"""SpeechInstruct's answers are shorter (Zhang et al. 2023, §3.2): more at once was never spoken in training."""
_FEWEST_WORDS = 3
"""What is shorter may be no sentence: `Dr. Who`, `at 3 p.m. today`."""
_SENTENCE_END, _COMMA = re.compile(r"(?<=[.!?;:…])\s+"), re.compile(r"(?<=,)\s+")


def sayable(text: str, most: int = _MOST_WORDS) -> list[str]:
    """Its sentences, as recordings with a transcript are; one of more than so many words is cut at commas, or where it
    must be. Very short pieces stay with what follows."""
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        for part in _cut(sentence, most):
            if pieces and _words(pieces[-1]) < _FEWEST_WORDS and _words(pieces[-1]) + _words(part) <= most:
                pieces[-1] = f"{pieces[-1]} {part}"
            else:
                pieces.append(part)
    return pieces


def _cut(sentence: str, most: int) -> Iterator[str]:
    if _words(sentence) <= most:
        yield sentence
        return
    for clause in _COMMA.split(sentence):
        words = clause.split()
        for start in range(0, len(words), most):
            yield " ".join(words[start : start + most])


def _words(text: str) -> int:
    return len(text.split())
