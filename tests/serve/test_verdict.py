"""When a bundle on trial is worse than the one that serves."""

import random
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from serve.tally import STREAMED, WHOLE, Figures
from serve.verdict import Terms, at_least, fault

TERMS = Terms()


def figures(answered: int = 0, failed: int = 0, streamed: list[float] | None = None) -> Figures:
    return Figures(answered, failed, 0, {STREAMED: deque(streamed or []), WHOLE: deque()})


@given(st.integers(1, 10_000), st.data())
def test_the_bound_lies_below_the_share(answered: int, data: st.DataObject) -> None:
    failed = data.draw(st.integers(0, answered))
    assert 0 <= at_least(failed, answered) <= failed / answered + 1e-9
    assert at_least(0, answered) < 1e-9


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_no_failures_no_fault(old: int, new: int) -> None:
    assert fault(figures(old), figures(new), TERMS) is None


@given(st.integers(0, 10_000), st.integers(3, 1000))
def test_whatever_fails_always_is_found_after_three(old: int, new: int) -> None:
    assert fault(figures(old), figures(new, new), TERMS)


@given(st.integers(1, 300), st.floats(0, 1))
def test_one_that_fails_as_often_as_the_other_is_no_worse(scale: int, share: float) -> None:
    """However often both fail: what is wrong may be wrong with the cluster."""
    old, new = 9 * scale, scale
    assert fault(figures(old, round(old * share)), figures(new, int(new * share)), TERMS) is None


@given(st.integers(20, 500), st.integers(0, 100))
def test_a_failure_more_never_helps(answered: int, failed: int) -> None:
    old = figures(1000, 10)
    if failed < answered and fault(old, figures(answered, failed), TERMS):
        assert fault(old, figures(answered, failed + 1), TERMS)


def times(seed: int, count: int, scale: float = 1.0) -> list[float]:
    """With the long tail of real ones."""
    draw = random.Random(seed)
    return [scale * 0.3 * draw.lognormvariate(0, 0.5) for _ in range(count)]


@given(st.integers(0, 10_000), st.integers(8, 200))
def test_the_same_times_are_no_fault(seed: int, count: int) -> None:
    assert fault(figures(streamed=times(seed, 9 * count)), figures(streamed=times(-seed - 1, count)), TERMS) is None


@given(st.integers(0, 10_000), st.integers(20, 200))
def test_times_as_long_again_and_again_are(seed: int, count: int) -> None:
    slow = figures(streamed=times(-seed - 1, count, 4.0))
    reason = fault(figures(streamed=times(seed, 9 * count)), slow, TERMS)
    assert reason and "first sound" in reason


@given(st.integers(0, 10_000), st.floats(1, 1.4))
def test_somewhat_slower_is_let_pass(seed: int, scale: float) -> None:
    slower = figures(streamed=times(-seed - 1, 40, scale))
    assert fault(figures(streamed=times(seed, 400)), slower, TERMS) is None


@given(st.lists(st.floats(0, 1000), max_size=7), st.lists(st.floats(0, 1000), max_size=50))
def test_few_times_tell_nothing(few: list[float], many: list[float]) -> None:
    assert fault(figures(streamed=few), figures(streamed=many), TERMS) is None
    assert fault(figures(streamed=many), figures(streamed=few), TERMS) is None
