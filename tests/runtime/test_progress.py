"""What a counter says of the rate and the time left."""

import time

import pytest

from speechgpt.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left(clock: list[float]) -> None:
    with Progress(silent=True).count("speaking", 400, "clips", done=40) as counter:
        clock[0] += 10
        counter.advance(20)
        assert counter.line() == "speaking: 60/400 clips, 2 clips/s, 170 s left"


def test_what_an_earlier_attempt_did_does_not_count_into_the_rate(clock: list[float]) -> None:
    with Progress(silent=True).count("vocoder", 1000, "steps") as counter:
        clock[0] += 30
        counter.begin(810)
        clock[0] += 10
        counter.reach(820)
        assert counter.line() == "vocoder: 820/1000 steps, 1 steps/s, 180 s left"
