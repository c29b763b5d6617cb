"""Which bundle takes a request, and what is counted of it."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import visits
from serve.errors import ApiError
from serve.meters import Meters
from serve.prompting import Words
from serve.reports import FRESH_SECONDS, Report, Reports
from serve.switch import Route, Switch, Target, settled
from serve.tally import STREAMED, WHOLE, Figures, Tallied, Tally
from serve.visits import Visit
from serve.voice import Sound

OLD, NEW = (Route(application=f"bundle-{digest}", digest=digest, created=1, adapters=[]) for digest in ("old", "new"))


def trial(share: float) -> Target:
    return Target(name="tiny", serving=OLD, canary=NEW, share=share, watch="w")


def switch(target: Target) -> tuple[Switch, Tally]:
    tally = Tally()
    made = Switch(tally, lambda name, route: SimpleNamespace(served=SimpleNamespace(name=name, **route)))  # type: ignore[arg-type]
    made.turn(target)
    return made, tally


def arrive(chooser: Switch, kind: str = "request") -> Visit:
    visit = Visit(kind, "")
    visits.begin(visit)
    assert chooser.service().served.digest == chooser.digest() == visit.bundle  # type: ignore[attr-defined]
    return visit


@given(st.floats(0, 1), st.integers(1, 400))
def test_a_share_of_the_requests_is_met_to_a_few(share: float, count: int) -> None:
    chooser, _ = switch(trial(share))
    taken = sum(arrive(chooser).bundle == "new" for _ in range(count))
    assert abs(taken - share * count) <= 4


@given(st.integers(2, 12), st.floats(0.2, 0.8))
def test_requests_in_a_rhythm_do_not_all_fall_to_one_side(period: int, share: float) -> None:
    """Such as streamed and plain ones by turns."""
    chooser, _ = switch(trial(share))
    taken = [arrive(chooser).bundle == "new" for _ in range(period * 60)]
    assert all(abs(sum(taken[phase::period]) / 60 - share) < 0.15 for phase in range(period))


def test_none_and_all_are_exact() -> None:
    none, _ = switch(trial(0.0))
    whole, _ = switch(trial(1.0))
    assert {arrive(none).bundle for _ in range(200)} == {"old"}
    assert {arrive(whole).bundle for _ in range(200)} == {"new"}


def test_a_visit_stays_with_its_bundle_whatever_becomes_of_the_target() -> None:
    chooser, tally = switch(settled("tiny", OLD))
    session = arrive(chooser, "session")
    chooser.turn(trial(1.0))
    chooser.turn(settled("tiny", NEW))
    assert arrive(chooser).bundle == "new"
    visits.begin(session)
    assert chooser.service().served.digest == "old" and chooser.digest() == "old"
    assert tally.of("old").ongoing == 1
    tally.end(session, 101)
    assert tally.of("old").ongoing == 0


def test_a_reply_before_any_choice_names_the_bundle_that_serves() -> None:
    chooser, tally = switch(trial(1.0))
    visits.begin(Visit("request", ""))
    assert chooser.digest() == "old"
    assert not any(figures.ongoing for figures in tally.bundles.values())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A pipeline of the test's own: each step takes a second, sound comes in the second second, then it may fail."""

    def __init__(self, clock: Clock, error: Exception | None = None) -> None:
        self.clock = clock
        self.error = error

    async def hear(self, clip: bytes) -> Any:
        self.clock.now += 1

    async def reply(self, task: Any) -> Any:
        self.clock.now += 1
        if self.error:
            raise self.error

    async def speak(self, line: Any, format: str, rate: int) -> bytes:
        self.clock.now += 1
        return b""

    async def unfold(self, task: Any) -> AsyncGenerator[Any, None]:
        self.clock.now += 1
        yield Words("answer", "yes")

    async def voice(self, task: Any, manner: Any) -> AsyncGenerator[Any, None]:
        self.clock.now += 1
        yield Words("answer", "yes")
        self.clock.now += 1
        yield Sound(b"")
        if self.error:
            raise self.error


def observed(kind: str, error: Exception | None = None) -> tuple[Tallied, Tally, Visit]:
    clock, tally, visit = Clock(), Tally(), Visit(kind, "", bundle="new")
    tally.begin("new")
    visits.begin(visit)
    return Tallied(Slow(clock, error), "new", tally, Meters(), clock), tally, visit


async def spoken(pipeline: Tallied) -> None:
    async for _ in pipeline.voice(None, None):  # type: ignore[arg-type]
        pass


def test_the_first_sound_is_timed_from_the_first_work_for_it() -> None:
    async def turns() -> Tally:
        pipeline, tally, _ = observed("session")
        await pipeline.hear(b"")
        await spoken(pipeline)
        await spoken(pipeline)
        await pipeline.reply(None)  # type: ignore[arg-type]
        await pipeline.speak(None, "wav", 1)  # type: ignore[arg-type]
        return tally

    tally = asyncio.run(turns())
    assert list(tally.of("new").seconds[STREAMED]) == [3.0, 2.0]
    assert list(tally.of("new").seconds[WHOLE]) == [2.0]
    assert (tally.of("new").answered, tally.of("new").failed) == (3, 0)


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (RuntimeError(), 1),
        (TimeoutError(), 1),
        (ApiError(503, "", code="unavailable"), 1),
        (ApiError(429, "", code="at_capacity"), 1),
        (ApiError(400, "", code="audio_silent"), 0),
    ],
)
@pytest.mark.parametrize("kind", ["request", "session"])
def test_what_breaks_in_the_middle_of_a_stream_is_a_failure(kind: str, error: Exception, failed: int) -> None:
    async def stream() -> tuple[Tally, Visit]:
        pipeline, tally, visit = observed(kind, error)
        with pytest.raises(type(error)):
            await spoken(pipeline)
        return tally, visit

    tally, visit = asyncio.run(stream())
    tally.end(visit, 200)
    assert (tally.of("new").answered, tally.of("new").failed, tally.of("new").ongoing) == (1, failed, 0)


def test_a_request_that_comes_to_no_model_is_not_counted() -> None:
    tally = Tally()
    listing = Visit("request", "", bundle="new")
    tally.begin("new")
    tally.end(listing, 200)
    tally.end(Visit("request", ""), 401)
    assert (tally.of("new").answered, tally.of("new").ongoing) == (0, 0)
    late = Visit("request", "", bundle="new", asked=True)
    tally.begin("new")
    tally.end(late, 504)
    assert (tally.of("new").answered, tally.of("new").failed) == (1, 1)


def test_counting_anew_forgets_nothing_that_is_under_way() -> None:
    tally = Tally()
    tally.begin("old")
    tally.answered("old", failed=True)
    tally.answered("new", failed=True)
    tally.restart()
    assert tally.bundles == {"old": Figures(ongoing=1)}


def test_reports_add_up_and_the_silent_have_nothing_under_way() -> None:
    clock = Clock()
    reports = Reports(clock)
    reports.expect("second")
    reports.put(Report("a", "first", {"old": Figures(9, 9, 9)}))
    reports.put(Report("a", "second", {"old": Figures(1, 0, 1), "new": Figures(2, 1, 0)}))
    clock.now += FRESH_SECONDS + 1
    reports.put(Report("b", "second", {"old": Figures(3, 1, 2)}))
    told = reports.figures()
    assert (told["old"].answered, told["old"].failed, told["old"].ongoing) == (4, 1, 2)
    assert (told["new"].answered, told["new"].failed) == (2, 1)
    assert reports.replicas() == {"b"}
    reports.expect("third")
    assert reports.figures() == {} and reports.replicas() == set()
