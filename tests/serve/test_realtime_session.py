"""Sessions of the realtime API in this process: what is told, in which order, in OpenAI's own types."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient, WebSocketTestSession

Event = dict[str, Any]
SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
QUESTION = "what is two plus three"
VAD_OFF = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}}


def voice(seconds: float = 1.0, rate: int = 24_000) -> bytes:
    """16-bit samples at 24 kHz: a gliding tone in syllables."""
    time = np.arange(int(seconds * rate)) / rate
    syllables = np.sin(2 * np.pi * 2 * time) ** 2
    wave = 0.4 * syllables * np.sin(2 * np.pi * (220 + 200 * time) * time)
    return (wave * 32767).astype("<i2").tobytes()


def silence(seconds: float, rate: int = 24_000) -> bytes:
    return bytes(int(seconds * rate) * 2)


def checked(event: Event) -> Event:
    """The event, if OpenAI's client knows its type and every field has the type that it is declared with."""
    read = SERVER_EVENT.validate_python(event, strict=False)
    assert read.type == event["type"]
    assert event["event_id"].startswith("event_")
    return event


class Client:
    """A client that takes the server's events one by one, each checked, and remembers them."""

    def __init__(self, socket: WebSocketTestSession) -> None:
        self.socket = socket
        self.seen: list[Event] = []

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send_text(json.dumps({"type": type, **fields}))

    def speak(self, sound: bytes, step: int = 9_600) -> None:
        for start in range(0, len(sound), step):
            self.send("input_audio_buffer.append", audio=base64.b64encode(sound[start : start + step]).decode())

    def write(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})

    def next(self) -> Event:
        event = checked(json.loads(self.socket.receive_text()))
        self.seen.append(event)
        return event

    def until(self, type: str) -> Event:
        while (event := self.next())["type"] != type:
            pass
        return event

    def types(self) -> list[str]:
        """Of what came since the last call, runs of one type as one."""
        types = [event["type"] for event in self.seen]
        self.seen.clear()
        return [type for place, type in enumerate(types) if place == 0 or types[place - 1] != type]


@pytest.fixture
def connect(http: TestClient) -> Callable[..., Any]:
    @contextmanager
    def connected(path: str = "/v1/realtime?model=tiny", **more: Any) -> Iterator[Client]:
        with http.websocket_connect(path, **more) as socket:
            client = Client(socket)
            assert client.until("session.created")["session"]["model"] == "tiny"
            client.seen.clear()
            yield client

    return connected


SPOKEN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]


def test_a_spoken_turn_in_the_order_of_the_api(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.speak(silence(0.5) + voice(1.2) + silence(1))
        done = client.until("response.done")["response"]
        events = list(client.seen)
        assert client.types() == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            *SPOKEN,
        ]
    assert done["status"] == "completed" and done["usage"]["input_token_details"]["audio_tokens"] > 0
    [output] = done["output"]
    assert output["content"] == [{"type": "output_audio", "transcript": output["content"][0]["transcript"]}]
    started, stopped = events[0], events[1]
    assert started["item_id"] == stopped["item_id"] == events[2]["item_id"] == events[3]["item"]["id"]
    # The voice goes from 500 ms to 1700 ms; before it are 300 ms, after it 500 ms of silence.
    assert 150 <= started["audio_start_ms"] <= 350 and 1900 <= stopped["audio_end_ms"] <= 2350
    sound = b"".join(base64.b64decode(e["delta"]) for e in events if e["type"] == "response.output_audio.delta")
    assert len(sound) > 2_400 and len(sound) % 2 == 0
    words = "".join(e["delta"] for e in events if e["type"] == "response.output_audio_transcript.delta")
    assert words == output["content"][0]["transcript"] != ""


def test_text_in_text_out(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.send("session.update", session={"type": "realtime", "output_modalities": ["text"]})
        assert client.next()["session"]["output_modalities"] == ["text"]
        client.seen.clear()
        client.write(QUESTION)
        client.send("response.create")
        done = client.until("response.done")["response"]
        assert client.types() == [
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "conversation.item.done",
            "response.output_item.done",
            "response.done",
        ]
        [part] = done["output"][0]["content"]
        assert part["type"] == "output_text" and part["text"]
        # One response may be another way.
        client.send("response.create", response={"output_modalities": ["audio"], "max_output_tokens": 12})
        cut = client.until("response.done")["response"]
        assert (cut["status"], cut["status_details"]) == (
            "incomplete",
            {"type": "incomplete", "reason": "max_output_tokens"},
        )
        assert cut["output_modalities"] == ["audio"] and cut["max_output_tokens"] == 12
