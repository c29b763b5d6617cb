"""What is counted when, by stand-ins for Ray's counters; a live page is looked at in test_service.py."""

import asyncio
from collections.abc import Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve import meters
from serve.guard import Ending, Guard
from serve.meters import GATEWAY_METRICS, VOCODER_METRICS, Meters, VoiceMeters


class Counted:
    """Ray's Counter, Gauge and Histogram."""

    all: dict[str, list[tuple[float, dict[str, str]]]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self._values = self.all.setdefault(name.removeprefix("speechgpt_"), [])

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._values.append((value, tags or {}))

    observe = set = inc


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[tuple[float, dict[str, str]]]]]:
    Counted.all = {}
    for name in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(meters, name, Counted)
    yield Counted.all


def test_requests_by_how_they_ended(counted: dict[str, list]) -> None:
    mine = Meters()
    for status, gone in ((200, False), (429, False), (504, False), (200, True), (0, True), (400, False)):
        mine.request("POST /v1", status, 0.5, gone=gone)
    assert [tags["status"] for _, tags in counted["requests_total"]] == ["200", "429", "504", "200", "0", "400"]
    assert [tags for _, tags in counted["rejected_total"]] == [{"reason": "too_many_requests"}]
    assert [tags["reason"] for _, tags in counted["cancelled_total"]] == ["deadline", "client_gone", "client_gone"]
    assert counted["request_seconds"] == [(0.5, {"route": "POST /v1"})] * 6


def test_a_stream_as_its_listener_has_it(counted: dict[str, list]) -> None:
    """Pieces of a second each, made at 1, 1.5, 4 and 4.2 s: the third comes when 3 s have been played."""
    moments = iter([0.0, 1.0, 1.5, 4.0, 4.2, 4.4])
    with VoiceMeters().streamed(lambda: next(moments)) as piece:
        for _ in range(4):
            piece(1.0)
    assert counted["stream_underruns_total"] == [(1, {})]
    assert counted["audio_seconds_generated_total"] == [(4.0, {})]
    assert counted["realtime_factor"] == [(pytest.approx(1.1), {})]


def test_an_answer_without_sound_has_no_factor(counted: dict[str, list]) -> None:
    with VoiceMeters().streamed():
        pass
    assert not counted["realtime_factor"] and not counted["audio_seconds_generated_total"]


def test_the_names_are_those_that_are_made(counted: dict[str, list]) -> None:
    Meters(), VoiceMeters()
    assert {f"speechgpt_{name}" for name in counted} == {*GATEWAY_METRICS, *VOCODER_METRICS}


def test_methods_that_clients_make_up_are_one() -> None:
    endings: list[Ending] = []

    async def refused(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 405, "headers": []})

    async def nothing(*_: object) -> Message:
        return {"type": "http.request"}

    guard = Guard(refused, bundle=lambda: "", deadline_seconds=5, ended=lambda _, ending: endings.append(ending))
    for method in ("POST", "BREW", "BREW2"):
        asyncio.run(guard({"type": "http", "headers": [], "method": method}, nothing, nothing))  # type: ignore[arg-type]
    assert [ending.route for ending in endings] == ["POST unmatched", "OTHER unmatched", "OTHER unmatched"]


def test_who_leaves_is_told_from_who_stays() -> None:
    endings: list[Ending] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(5)

    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def nowhere(message: Message) -> None:
        pass

    async def visited(patience: float, deadline: float) -> None:
        guard = Guard(
            slow, bundle=lambda: "digest", deadline_seconds=deadline, ended=lambda _, ending: endings.append(ending)
        )
        task = asyncio.create_task(guard({"type": "http", "headers": [], "method": "GET"}, never, nowhere))
        await asyncio.wait([task], timeout=patience)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(visited(0.05, 5))
    asyncio.run(visited(5, 0.05))
    assert [(ending.status, ending.gone) for ending in endings] == [(200, True), (504, False)]
