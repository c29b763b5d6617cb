"""Events, subtitles, metrics pages and durations: pure functions of the serving layer."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ApiError
from serve.events import DONE, chat_events, slices, told_of_faults
from serve.metrics import merge
from serve.pacing import FEWEST, MOST, Pacing
from serve.prompting import Reply, Words
from serve.service import Kept, LiveAnswer, LivePiece
from serve.subtitles import srt, vtt
from serve.vocoder import at_speed
from serve.voice import Sound
from serve.wire import Reading

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "tiny"}


def reply(text: str) -> Reply:
    return Reply("two plus three", text, [1, 2], True, "stop", 10, 5, 4, 2)


def reading(reply: Reply) -> Reading:
    return Reading(question_transcript=reply.transcript, well_formed=reply.well_formed)


def chunks_of(*pieces: LivePiece, audio_id: str | None = None, usage: bool = False) -> list[dict]:
    """What a client reads: the chunks before `[DONE]`."""

    async def live() -> AsyncGenerator[LivePiece, None]:
        for piece in pieces:
            yield piece

    async def read() -> list[str]:
        told = (lambda reply: {"total_tokens": reply.audio_tokens}) if usage else None
        events = chat_events(HEAD, LiveAnswer(audio_id, live()), told, reading)
        return [line async for line in told_of_faults(events)]

    *lines, done = asyncio.run(read())
    assert done == DONE and all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_spoken_answer_as_events() -> None:
    *body, finish, usage = chunks_of(
        Words("transcript", "two plus"),
        Words("text", "it is"),
        Sound(b"\0\1"),
        Words("text", " five"),
        Sound(b"\2\3"),
        Kept(99),
        reply("it is five"),
        audio_id="audio_1",
        usage=True,
    )
    assert {chunk["object"] for chunk in (*body, finish, usage)} == {"chat.completion.chunk"}
    assert body[0]["id"] == "chatcmpl-1"
    assert usage["choices"] == [] and usage["usage"] == {"total_tokens": 2}
    assert finish["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert finish["speechgpt"] == {"question_transcript": "two plus three", "well_formed": True, "not_followed": []}
    assert [chunk["choices"][0]["delta"] for chunk in body] == [
        {"role": "assistant", "audio": {"id": "audio_1", "transcript": ""}},
        {"speechgpt": {"question_transcript": "two plus"}},
        {"audio": {"transcript": "it is"}},
        {"audio": {"data": "AAE="}},
        {"audio": {"transcript": " five"}},
        {"audio": {"data": "AgM="}},
        {"audio": {"expires_at": 99}},
    ]


def test_a_written_answer_as_events() -> None:
    *body, finish = chunks_of(Words("text", "it is"), Words("text", " five"), reply("it is five"))
    deltas = [chunk["choices"][0]["delta"] for chunk in body]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "it is five"
    assert "usage" not in finish


def test_a_fault_in_the_middle_is_the_last_event() -> None:
    closed = []

    async def broken(error: Exception) -> AsyncGenerator[str, None]:
        try:
            yield "data: {}\n\n"
            raise error
        finally:
            closed.append(error)

    async def read(error: Exception) -> list[str]:
        return [line async for line in told_of_faults(broken(error))]

    faults: list[tuple[Exception, str]] = [
        (ApiError(503, "gone", code="unavailable"), "unavailable"),
        (TimeoutError(), "deadline_exceeded"),
        (ValueError("x"), "internal_error"),
    ]
    for error, code in faults:
        _, last = asyncio.run(read(error))
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert len(closed) == 3


def test_a_stream_says_that_its_time_is_over() -> None:
    closed = []

    async def stuck() -> AsyncGenerator[str, None]:
        try:
            yield "data: {}\n\n"
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def read() -> list[str]:
        return [line async for line in told_of_faults(stuck(), time.monotonic() + 0.2)]

    first, last = asyncio.run(read())
    assert first == "data: {}\n\n" and closed
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=40), max_size=20))
def test_pieces_grow_and_lose_nothing(given_units: list[list[int]]) -> None:
    pacing = Pacing(25)
    pieces = [piece for units in given_units for piece in pacing.push(units)]
    sizes = [len(piece) for piece in pieces]
    assert sizes[:1] in ([], [25]) and sizes[1:] == sorted(sizes[1:])
    assert all(FEWEST <= size <= MOST for size in sizes)
    everything = [unit for units in given_units for unit in units]
    assert [unit for piece in (*pieces, *pacing.finish()) for unit in piece] == everything
    # Who gives one by one gets the same pieces.
    single = Pacing(25)
    assert [piece for unit in everything for piece in single.push([unit])] == pieces


@settings(deadline=None)
@given(st.binary(max_size=50_000))
def test_slices_are_whole_samples(data: bytes) -> None:
    pieces = [base64.b64decode(piece) for piece in slices(data)]
    assert b"".join(pieces) == data and all(len(piece) % 2 == 0 for piece in pieces[:-1])


def test_subtitles_span_the_clip() -> None:
    assert srt("five", 3661.2345) == "1\n00:00:00,000 --> 01:01:01,234\nfive\n\n"
    assert vtt("five", 0.02) == "WEBVTT\n\n00:00:00.000 --> 00:00:00.020\nfive\n\n"


def test_metrics_of_two_nodes_are_one_page() -> None:
    one = '# HELP up Alive\n# TYPE up gauge\nup{node="a"} 1\n# TYPE down counter\ndown 2\n'
    two = '# HELP up Alive\n# TYPE up gauge\nup{node="b"} 1\n'
    assert merge([one, two]) == (
        '# HELP up Alive\n# TYPE up gauge\nup{node="a"} 1\nup{node="b"} 1\n# TYPE down counter\ndown 2\n'
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1), st.floats(0.25, 4))
def test_speed_scales_the_whole(durations: list[int], speed: float) -> None:
    scaled = at_speed(np.array(durations), speed)
    assert len(scaled) == len(durations) and min(scaled) >= 0
    assert sum(scaled) == pytest.approx(sum(durations) / speed, abs=0.5)


def test_normal_speed_changes_nothing() -> None:
    assert at_speed(np.array([3, 1, 4, 1, 5]), 1.0) == [3, 1, 4, 1, 5]
