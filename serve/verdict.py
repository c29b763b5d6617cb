"""Whether a bundle on trial is worse than the one that serves. Both are looked at over the same time."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve.tally import Figures

_SIGMAS = 2.58
"""How sure it must be that more answers fail, as 99.5 % one way: it is looked at again and again."""
_LEAST_FAILED = 3
"""One broken answer tells nothing."""
_LEAST_TIMES = 8
"""Of either bundle, before their times are compared."""
_CHANCE = 0.001


@dataclass(frozen=True)
class Terms:
    """What a new bundle must stand. share: of the requests, while it is on trial.

    watch_seconds: how long it is looked at, with this share and then with all requests. requests: how many it must have
    answered by then, or the look lasts longer, up to patience_seconds. margin: what share of answers more than of the
    other's may fail. slower: how many times as long as the other's its first sound may take.
    """

    share: float = 0.1
    watch_seconds: float = 60.0
    requests: int = 20
    patience_seconds: float = 600.0
    margin: float = 0.02
    slower: float = 1.5


def fault(old: Figures, new: Figures, terms: Terms) -> str | None:
    """In what way the new bundle is worse, in words; None while nothing tells that it is."""
    if reason := _fails_more(old, new, terms.margin):
        return reason
    for kind, seconds in new.seconds.items():
        if reason := _is_slower(list(old.seconds[kind]), list(seconds), kind, terms.slower):
            return reason
    return None


def at_least(failed: int, answered: int) -> float:
    """Wilson's lower bound of the share that fails."""
    if not answered:
        return 0.0
    share, spread = failed / answered, _SIGMAS**2 / answered
    middle = share + spread / 2
    reach = _SIGMAS * (share * (1 - share) / answered + spread / answered / 4) ** 0.5
    return max(0.0, (middle - reach) / (1 + spread))


def _fails_more(old: Figures, new: Figures, margin: float) -> str | None:
    usual = old.failed / old.answered if old.answered else 0.0
    if new.failed < _LEAST_FAILED or at_least(new.failed, new.answered) <= usual + margin:
        return None
    return f"{new.failed} of its {new.answered} answers failed, {old.failed} of {old.answered} of the other bundle's"


def _is_slower(old: Sequence[float], new: Sequence[float], kind: str, slower: float) -> str | None:
    """By ranks (Mann and Whitney), because times of first sounds have long tails."""
    if min(len(old), len(new)) < _LEAST_TIMES:
        return None
    from scipy.stats import mannwhitneyu

    chance = mannwhitneyu(new, [seconds * slower for seconds in old], alternative="greater").pvalue
    if chance >= _CHANCE:
        return None
    return (
        f"its first sound took {median(new):.3f} s (median of {len(new)} {kind} answers), "
        f"the other bundle's {median(old):.3f} s (of {len(old)})"
    )


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
