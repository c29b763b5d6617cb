"""Events, subtitles, metrics pages and durations: pure functions of the serving layer."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.events import DONE, chat_events, slices, words
from serve.metrics import merge
from serve.prompting import Reply, in_groups
from serve.service import ChatAnswer, SpokenAnswer
from serve.subtitles import srt, vtt
from serve.vocoder import at_speed

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "tiny"}


def reply(text: str) -> Reply:
    return Reply("two plus three", text, [1, 2], True, "stop", 10, 5, 4, 2)


def test_a_spoken_answer_as_events() -> None:
    sound = bytes(range(256)) * 100
    answer = ChatAnswer(reply("it is five"), SpokenAnswer("audio_1", sound, 99))
    *lines, done = chat_events(HEAD, answer, {"total_tokens": 21})
    assert done == DONE
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and chunks[0]["id"] == "chatcmpl-1"
    *body, finish, usage = chunks
    assert usage["choices"] == [] and usage["usage"] == {"total_tokens": 21}
    assert finish["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    deltas = [chunk["choices"][0]["delta"] for chunk in body]
    assert deltas[0] == {"role": "assistant", "audio": {"id": "audio_1", "transcript": ""}}
    assert deltas[-1] == {"audio": {"expires_at": 99}}
    assert "".join(delta["audio"].get("transcript", "") for delta in deltas) == "it is five"
    assert b"".join(base64.b64decode(delta["audio"].get("data", "")) for delta in deltas) == sound


def test_a_written_answer_as_events() -> None:
    *lines, finish, done = chat_events(HEAD, ChatAnswer(reply("it is five"), None), None)
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "it is five"
    assert "usage" not in finish and done == DONE


@settings(deadline=None)
@given(st.text())
def test_words_join_to_the_text(text: str) -> None:
    assert "".join(words(text)) == text


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


def test_groups_keep_the_order_of_their_items() -> None:
    calls: list[list[int]] = []

    def work(group: list[int]) -> list[int]:
        calls.append(group)
        return [10 * item for item in group]

    assert in_groups([1, 2, 3, 4, 5], lambda item: item % 2, work) == [10, 20, 30, 40, 50]
    assert calls == [[1, 3, 5], [2, 4]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1), st.floats(0.25, 4))
def test_speed_scales_the_whole(durations: list[int], speed: float) -> None:
    scaled = at_speed(np.array(durations), speed)
    assert len(scaled) == len(durations) and min(scaled) >= 0
    assert sum(scaled) == pytest.approx(sum(durations) / speed, abs=0.5)


def test_normal_speed_changes_nothing() -> None:
    assert at_speed(np.array([3, 1, 4, 1, 5]), 1.0) == [3, 1, 4, 1, 5]
