"""Sessions of the realtime API in this process: what is told, in which order, in OpenAI's own types."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient, WebSocketTestSession

from serve.gateway import create_app
from serve.memory import OwnMemory
from serve.service import Service

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


class Held:
    """The real pipeline, whose answers wait after their first `pieces` until they are let go or given up."""

    def __init__(self, pipeline: Any, pieces: int) -> None:
        self._pipeline, self._pieces = pipeline, pieces
        self.open = 0
        """Answers that somebody still waits for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def unfold(self, task: Any) -> Any:
        return self._held(self._pipeline.unfold(task))

    def voice(self, task: Any, manner: Any) -> Any:
        return self._held(self._pipeline.voice(task, manner))

    async def _held(self, pieces: Any) -> Any:
        self.open += 1
        try:
            async with aclosing(pieces):
                seen = 0
                async for piece in pieces:
                    if seen == self._pieces:
                        await asyncio.Event().wait()
                    seen += 1
                    yield piece
        finally:
            self.open -= 1


@pytest.fixture
def held(service: Service) -> Iterator[Callable[..., Any]]:
    """Sessions whose answers stop after so many pieces; afterwards nothing of them may be left."""
    pipelines: list[Held] = []

    @contextmanager
    def connected(pieces: int, **changes: Any) -> Iterator[Client]:
        serving = service.serving.model_copy(update=changes)
        pipeline = Held(service._pipeline, pieces)
        pipelines.append(pipeline)
        own = Service(service.served, pipeline, OwnMemory(60, 10), serving, service._generation)
        http = TestClient(create_app(lambda: own, list, serving, None))
        with http, http.websocket_connect("/v1/realtime?model=tiny") as socket:
            client = Client(socket)
            client.until("session.created")
            yield client

    yield connected
    until = time.monotonic() + 30
    while (left := [service._pipeline._prompter.ongoing, *(p.open for p in pipelines)]) and any(left):
        assert time.monotonic() < until, left
        time.sleep(0.05)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_an_answer_is_cancelled_at_any_stage(held: Callable[..., Any], pieces: int) -> None:
    with held(pieces) as client:
        client.write(QUESTION)
        client.send("response.create")
        created = client.until("response.created")["response"]["id"]
        if pieces == 3:
            client.until("response.output_audio_transcript.delta")
        client.send("response.cancel", response_id="resp_other")
        assert client.until("error")["error"]["code"] == "response_cancel_not_active"
        client.send("response.create", event_id="second")
        error = client.until("error")["error"]
        assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "second")
        client.send("response.cancel", response_id=created)
        done = client.until("response.done")["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
        types = [event["type"] for event in client.seen]
        assert types.count("response.output_item.added") == types.count("response.output_item.done")
        assert [item["status"] for item in done["output"]] in ([], ["incomplete"])
        client.send("response.cancel")
        assert client.until("error")["error"]["code"] == "response_cancel_not_active"
