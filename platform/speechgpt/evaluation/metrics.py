"""What a model is judged by. Every rate comes with the interval that its number of utterances allows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from speechgpt.language.normaliser import words


@dataclass(frozen=True)
class Score:
    """A rate with its 95 % bootstrap interval over utterances; `count` is how many were measured."""

    value: float
    low: float
    high: float
    count: int

    def figures(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: utterances are drawn again `samples` times; 0 makes none (low = value = high)."""

    samples: int = 1000
    seed: int = 0


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(substitutions + deletions + insertions, words of the reference), both in normal form."""
    import jiwer

    wanted, heard = words(reference), words(hypothesis)
    if not wanted:
        return len(heard), 0
    counts = jiwer.process_words(" ".join(wanted), " ".join(heard))
    return counts.substitutions + counts.deletions + counts.insertions, len(wanted)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], bootstrap: Bootstrap) -> Score | None:
    """Corpus-level WER, errors over reference words; it may exceed 1. None if there are no reference words."""
    pairs = [word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    return ratio([errors for errors, _ in pairs], [length for _, length in pairs], bootstrap)


def exact_matches(references: Sequence[str], hypotheses: Sequence[str | None]) -> list[bool]:
    """Whether each hypothesis says the same words as its reference; a missing one does not."""
    return [h is not None and words(r) == words(h) for r, h in zip(references, hypotheses, strict=True)]


def share(outcomes: Sequence[bool], bootstrap: Bootstrap) -> Score | None:
    """The share of outcomes that are true; None if there are none."""
    return ratio([float(o) for o in outcomes], [1.0] * len(outcomes), bootstrap)


def ratio(numerators: Sequence[float], denominators: Sequence[float], bootstrap: Bootstrap) -> Score | None:
    """Sum over sum, with utterances (not words) as the unit that is drawn again; None if the denominators sum to 0."""
    return _resampled(numerators, denominators, bootstrap, lambda quotient: quotient)


def median(values: Sequence[float], bootstrap: Bootstrap) -> Score | None:
    """The middle value; None if there are none."""
    if not len(values):
        return None
    measured, value = np.asarray(values, dtype=float), float(np.median(values))
    low = high = value
    if bootstrap.samples:
        drawn = np.random.default_rng(bootstrap.seed).integers(0, len(measured), (bootstrap.samples, len(measured)))
        low, high = (float(q) for q in np.percentile(np.median(measured[drawn], axis=1), (2.5, 97.5)))
    return Score(value, low, high, len(measured))


def perplexity(losses: Sequence[float], tokens: Sequence[int], bootstrap: Bootstrap) -> Score | None:
    """exp(mean negative log-likelihood per token) from each utterance's summed loss (nats) and token count."""
    return _resampled(losses, tokens, bootstrap, np.exp)


def _resampled(
    numerators: Sequence[float],
    denominators: Sequence[float],
    bootstrap: Bootstrap,
    transform: Callable[[np.ndarray], np.ndarray],
) -> Score | None:
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if below.sum() == 0:
        return None
    value = float(transform(above.sum() / below.sum()))
    count = len(above)
    low = high = value
    if bootstrap.samples:
        drawn = np.random.default_rng(bootstrap.seed).integers(0, count, (bootstrap.samples, count))
        sums = below[drawn].sum(axis=1)
        quotients = above[drawn].sum(axis=1)[sums > 0] / sums[sums > 0]
        low, high = (float(q) for q in np.percentile(transform(quotients), (2.5, 97.5)))
    return Score(value, low, high, count)
