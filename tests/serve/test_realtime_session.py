"""Sessions of the realtime API in this process: what is told, in which order, in OpenAI's own types."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import aclosing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.realtime import RealtimeServerEvent
from own_limits import OwnLimits
from pydantic import TypeAdapter
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from serve.encoder import Heard
from serve.gateway import Access, create_app
from serve.keys import Allowance, KeyFile, KeyRing, hash_key, new_key
from serve.memory import OwnMemory
from serve.meters import Meters
from serve.realtime import places
from serve.realtime.session_config import MuLaw
from serve.realtime.sound import from_pcm16
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


@contextmanager
def opened(http: TestClient, path: str = "/v1/realtime?model=tiny", **more: Any) -> Iterator[WebSocketTestSession]:
    """A socket whose client may leave at any moment: starlette's then cancels the session, and shows that it did."""
    with suppress(futures.CancelledError), http.websocket_connect(path, **more) as socket:
        yield socket


@pytest.fixture
def connect(http: TestClient) -> Callable[..., Any]:
    @contextmanager
    def connected(path: str = "/v1/realtime?model=tiny", **more: Any) -> Iterator[Client]:
        with opened(http, path, **more) as socket:
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
        with http, opened(http) as socket:
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


def test_whoever_speaks_interrupts(held: Callable[..., Any]) -> None:
    with held(4) as client:
        client.write(QUESTION)
        client.send("response.create")
        client.until("response.output_audio_transcript.delta")
        client.seen.clear()
        client.speak(silence(0.3) + voice(0.8))
        done = client.until("response.done")["response"]
        assert (done["status"], done["status_details"]) == (
            "cancelled",
            {"type": "cancelled", "reason": "turn_detected"},
        )
        types = client.types()
        assert types.index("input_audio_buffer.speech_started") < types.index("response.done")
        # What follows the interruption is the next turn.
        client.speak(silence(1))
        events = [client.until("input_audio_buffer.committed"), client.until("response.created")]
        assert events[0]["previous_item_id"] == done["output"][0]["id"]


def test_an_answer_that_may_not_be_interrupted_goes_on(held: Callable[..., Any]) -> None:
    with held(2) as client:
        detection = {"type": "server_vad", "interrupt_response": False, "create_response": False}
        client.send("session.update", session={"audio": {"input": {"turn_detection": detection}}})
        client.write(QUESTION)
        client.send("response.create")
        client.until("response.created")
        client.seen.clear()
        client.speak(silence(0.3) + voice(0.8) + silence(1))
        client.until("input_audio_buffer.committed")
        assert "response.done" not in client.types()


def test_whoever_leaves_in_the_middle_leaves_nothing_behind(held: Callable[..., Any]) -> None:
    for pieces in (0, 2):
        with held(pieces) as client:
            client.write(QUESTION)
            client.send("response.create")
            client.until("response.created")
            client.speak(voice(0.6))


def test_a_session_that_is_too_old_or_too_still_is_closed(held: Callable[..., Any], service: Service) -> None:
    for changes, code in (({"idle_seconds": 0.3}, "session_idle"), ({"max_session_seconds": 0.3}, "session_expired")):
        realtime = service.serving.realtime.model_copy(update=changes)
        with held(0, realtime=realtime) as client:
            assert client.until("error")["error"]["code"] == code
            with pytest.raises(WebSocketDisconnect) as closed:
                client.next()
            assert closed.value.code == 1001


def test_a_hanging_answer_fails_at_the_deadline(held: Callable[..., Any]) -> None:
    with held(0, request_timeout_seconds=0.5) as client:
        client.write(QUESTION)
        client.send("response.create")
        done = client.until("response.done")["response"]
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "deadline_exceeded")


def test_silence_is_asked_whether_somebody_is_there(connect: Callable[..., Any]) -> None:
    with connect() as client:
        detection = {"type": "server_vad", "idle_timeout_ms": 1000}
        client.send("session.update", session={"audio": {"input": {"turn_detection": detection}}})
        client.write(QUESTION)
        client.send("response.create")
        client.until("response.done")
        client.seen.clear()
        done = client.until("response.done")["response"]
        assert client.types()[:4] == [
            "input_audio_buffer.timeout_triggered",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
        ]
        assert done["output"][0]["content"][0]["transcript"] == "are you still there"


def test_turns_by_hand_and_their_words(connect: Callable[..., Any]) -> None:
    with connect() as client:
        settings = {"turn_detection": None, "transcription": {"model": "tiny"}}
        client.send("session.update", session={"audio": {"input": settings}})
        client.send("input_audio_buffer.commit", event_id="empty")
        error = client.until("error")["error"]
        assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "empty")
        client.speak(voice(1), step=777)
        client.send("input_audio_buffer.clear")
        client.until("input_audio_buffer.cleared")
        client.send("input_audio_buffer.commit")
        assert client.until("error")["error"]["code"] == "input_audio_buffer_commit_empty"
        client.speak(voice(1))
        client.send("input_audio_buffer.commit")
        item = client.until("conversation.item.done")["item"]
        # Nothing is answered by itself; it is written down all the same.
        told = client.until("conversation.item.input_audio_transcription.completed")
        assert (
            told["item_id"] == item["id"]
            and told["transcript"]
            and told["usage"]["seconds"] == pytest.approx(1, abs=0.05)
        )
        assert "response.created" not in [event["type"] for event in client.seen]
        client.send("conversation.item.retrieve", item_id=item["id"])
        whole = client.until("conversation.item.retrieved")["item"]["content"][0]
        assert whole["transcript"] == told["transcript"]
        assert len(base64.b64decode(whole["audio"])) == pytest.approx(48_000, rel=0.05)
        client.send("conversation.item.delete", item_id=item["id"])
        client.until("conversation.item.deleted")
        client.send("response.create")
        assert client.until("response.done")["response"]["status_details"]["error"]["code"] == "empty_conversation"


def test_an_answer_tells_what_it_understood(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.send("session.update", session={"audio": {"input": {"transcription": {"model": "tiny"}}}})
        client.speak(silence(0.4) + voice(1) + silence(1))
        completed = client.until("conversation.item.input_audio_transcription.completed")
        deltas = [e for e in client.seen if e["type"] == "conversation.item.input_audio_transcription.delta"]
        assert "".join(e["delta"] for e in deltas) == completed["transcript"] != ""


def test_a_turn_that_nobody_can_hear_fails_alone(connect: Callable[..., Any]) -> None:
    hiss = (np.random.default_rng(0).normal(0, 1000, 24_000)).astype("<i2").tobytes()
    with connect() as client:
        client.send(**VAD_OFF)
        client.speak(hiss)
        client.send("input_audio_buffer.commit")
        client.send("response.create")
        done = client.until("response.done")["response"]
        assert (done["status"], done["status_details"]["error"]["code"]) == ("failed", "audio_no_speech")
        client.write(QUESTION)
        client.send("response.create")
        assert client.until("response.done")["response"]["status"] == "completed"


def test_what_was_heard_of_an_answer_is_what_it_remembers(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.send(**VAD_OFF)
        client.write(QUESTION)
        client.send("response.create")
        item = client.until("response.done")["response"]["output"][0]
        client.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=10**7)
        assert client.until("error")["error"]["param"] == "audio_end_ms"
        client.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=50)
        assert client.until("conversation.item.truncated")["audio_end_ms"] == 50
        client.send("conversation.item.retrieve", item_id=item["id"])
        cut = client.until("conversation.item.retrieved")["item"]["content"][0]
        assert len(cut["transcript"]) < len(item["content"][0]["transcript"])
        assert item["content"][0]["transcript"].startswith(cut["transcript"])


def test_it_remembers_until_the_context_is_full(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.send("session.update", session={"output_modalities": ["text"], "max_output_tokens": 20})
        read = []
        for _ in range(14):
            client.write(QUESTION)
            client.send("response.create")
            done = client.until("response.done")["response"]
            assert done["status"] in ("completed", "incomplete"), done
            read.append(done["usage"]["input_tokens"])
        assert read[1] > read[0] and max(read) + 20 <= 512 and any(b <= a for a, b in pairwise(read))
        client.send("session.update", session={"truncation": "disabled"})
        client.write(" ".join([QUESTION] * 17))
        client.send("response.create")
        done = client.until("response.done")["response"]
        assert done["status_details"]["error"]["code"] == "context_length_exceeded"


def test_a_response_beside_the_conversation(connect: Callable[..., Any]) -> None:
    with connect() as client:
        client.send(**VAD_OFF)
        content = [{"type": "input_audio", "audio": base64.b64encode(voice()).decode()}]
        asked = {"type": "message", "role": "user", "content": content}
        params = {"conversation": "none", "input": [asked], "output_modalities": ["text"], "metadata": {"topic": "x"}}
        client.send("response.create", response=params)
        done = client.until("response.done")["response"]
        assert (done["conversation_id"], done["metadata"]) == (None, {"topic": "x"})
        assert done["usage"]["input_token_details"]["audio_tokens"] > 0
        assert not [event for event in client.seen if event["type"].startswith("conversation.item")]


def test_telephone_sound(connect: Callable[..., Any]) -> None:
    with connect() as client:
        formats = {side: {"format": {"type": "audio/pcmu"}} for side in ("input", "output")}
        formats["input"]["turn_detection"] = None  # type: ignore[assignment]
        client.send("session.update", session={"audio": formats})
        ulaw = from_pcm16(voice(1, 8_000), MuLaw(type="audio/pcmu"))
        client.speak(ulaw, step=160)
        client.send("input_audio_buffer.commit")
        client.send("response.create")
        assert client.until("response.done")["response"]["status"] == "completed"
        deltas = [event["delta"] for event in client.seen if event["type"] == "response.output_audio.delta"]
        assert max(len(base64.b64decode(delta)) for delta in deltas) <= 1600


def test_errors_keep_the_session_open(connect: Callable[..., Any]) -> None:
    with connect() as client:
        for message, code in (("nonsense", "invalid_json"), ('{"type": "response.go"}', "invalid_value")):
            client.socket.send_text(message)
            assert client.next()["error"]["code"] == code
        client.send("input_audio_buffer.append", audio="%%%", event_id="e1")
        error = client.next()["error"]
        assert (error["code"], error["param"], error["event_id"]) == ("invalid_base64", "audio", "e1")
        client.send("session.update", session={"tools": [{"type": "function", "name": "f"}]})
        assert client.next()["error"]["param"] == "session.tools"
        client.send(**VAD_OFF)
        client.until("session.updated")
        client.send("input_audio_buffer.append", audio=base64.b64encode(voice(9)).decode())
        assert client.next()["error"]["code"] == "input_audio_buffer_full"
        client.write(QUESTION)
        assert client.next()["type"] == "conversation.item.added"


def test_who_is_refused_is_told_before_the_session_opens(service: Service) -> None:
    realtime = service.serving.realtime.model_copy(update={"max_sessions": 1, "max_message_bytes": 2048})
    serving = service.serving.model_copy(update={"realtime": realtime})
    ring = KeyRing("", hash_key("sk-test"), 1)
    http = TestClient(create_app(lambda: service, list, serving, Access(ring, OwnLimits())))
    known = {"authorization": "Bearer sk-test"}
    for path, headers, status, code in (
        ("/v1/realtime?model=tiny", {}, 401, "invalid_api_key"),
        ("/v1/realtime", known, 400, "missing_required_parameter"),
        ("/v1/realtime?model=gpt-realtime", known, 404, "model_not_found"),
    ):
        with pytest.raises(WebSocketDenialResponse) as denied, http.websocket_connect(path, headers=headers):
            pass
        assert (denied.value.status_code, denied.value.json()["error"]["code"]) == (status, code)
    offered = ["realtime", "openai-insecure-api-key.sk-test"]
    with opened(http, subprotocols=offered) as socket:
        assert socket.accepted_subprotocol == "realtime"
        with pytest.raises(WebSocketDenialResponse) as denied:
            http.websocket_connect("/v1/realtime?model=tiny", headers=known).__enter__()
        assert denied.value.status_code == 503 and int(denied.value.headers["retry-after"]) >= 1
        socket.receive_text()
        socket.send_text(" " * 3000)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1009
    with opened(http, headers=known) as socket:
        assert json.loads(socket.receive_text())["type"] == "session.created"


@contextmanager
def keyed(service: Service, folder: Path, allowance: Allowance) -> Iterator[Client]:
    key, kept = new_key("one", allowance, time.time())
    (folder / "keys.json").write_text(KeyFile(keys=(kept,)).model_dump_json())
    access = Access(KeyRing(str(folder / "keys.json"), None, 1), OwnLimits())
    http = TestClient(create_app(lambda: service, list, service.serving, access))
    with opened(http, headers={"authorization": f"Bearer {key}"}) as socket:
        yield Client(socket)


def test_each_answer_counts_for_its_key(service: Service, tmp_path: Path) -> None:
    with keyed(service, tmp_path, Allowance(requests_per_minute=2)) as client:
        client.send("session.update", session={"output_modalities": ["text"], "max_output_tokens": 4})
        statuses = []
        for _ in range(2):
            client.write(QUESTION)
            client.send("response.create")
            done = client.until("response.done")["response"]
            statuses.append((done["status"], (done["status_details"] or {}).get("error", {}).get("code")))
        # The session itself was the first request of the minute.
        assert statuses == [("incomplete", None), ("failed", "rate_limit_exceeded")]


NOTED = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None, "transcription": {}}}}}
WRITTEN = "conversation.item.input_audio_transcription"


@pytest.mark.parametrize("allowance", [Allowance(audio_seconds_per_day=0.5), Allowance(tokens_per_day=1)])
def test_a_session_that_wants_no_answers_is_heard_within_its_quota(
    service: Service, tmp_path: Path, allowance: Allowance
) -> None:
    with keyed(service, tmp_path, allowance) as client:
        client.send(**NOTED)
        client.speak(voice(1))
        client.send("input_audio_buffer.commit")
        client.until(f"{WRITTEN}.completed" if allowance.tokens_per_day else f"{WRITTEN}.failed")
        client.speak(voice(1))
        client.send("input_audio_buffer.commit")
        assert client.until(f"{WRITTEN}.failed")["error"]["code"] == "insufficient_quota"


def test_a_session_is_heard_a_few_turns_at_a_time(
    connect: Callable[..., Any], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, together, most = service.hear, 0, 0

    async def slowly(clip: bytes, param: str) -> Heard:
        nonlocal together, most
        together += 1
        most = max(most, together)
        await asyncio.sleep(0.05)
        together -= 1
        return await heard(clip, param)

    monkeypatch.setattr(service, "hear", slowly)
    with connect() as client:
        client.send(**NOTED)
        for _ in range(12):
            client.speak(voice(0.3))
            client.send("input_audio_buffer.commit")
        for _ in range(12):
            client.until(f"{WRITTEN}.completed")
    assert 1 < most <= 4


def test_a_turn_that_the_service_fails_to_write_down_is_told(
    connect: Callable[..., Any], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(heard: Heard, param: str) -> str:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(service, "write_down", broken)
    with connect() as client:
        client.send(**NOTED)
        client.speak(voice(1))
        client.send("input_audio_buffer.commit")
        error = client.until(f"{WRITTEN}.failed")["error"]
    assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_a_replica_that_goes_lets_answers_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LOOK_SECONDS", 0.1)
    going: list[bool] = []
    held = places.Places(5, 1, Meters(), lambda: bool(going))
    with TestClient(create_app(lambda: service, list, service.serving, None, held)) as http:
        with opened(http) as socket:
            client = Client(socket)
            client.write(QUESTION)
            client.send("response.create")
            client.until("response.created")
            going.append(True)
            seen = [client.next()["type"] for _ in range(200) if client.seen[-1]["type"] != "response.done"]
            assert client.seen[-1]["response"]["status"] == "completed"
            if "error" not in seen:
                assert client.until("error")["error"]["code"] == "going_away"
            with pytest.raises(WebSocketDisconnect) as closed:
                client.next()
            assert closed.value.code == 1012
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            http.websocket_connect("/v1/realtime?model=tiny"),
        ):
            pass
        assert denied.value.status_code == 503 and denied.value.json()["error"]["code"] == "replaced"


def test_a_replica_that_goes_hears_out_who_is_speaking(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LOOK_SECONDS", 0.1)
    going: list[bool] = []
    held = places.Places(5, 1, Meters(), lambda: bool(going))
    with TestClient(create_app(lambda: service, list, service.serving, None, held)) as http, opened(http) as socket:
        client = Client(socket)
        client.speak(silence(0.5) + voice(0.8))
        client.until("input_audio_buffer.speech_started")
        going.append(True)
        assert client.until("error")["error"]["code"] == "going_away"
        client.speak(voice(0.4) + silence(1))
        assert client.until("response.done")["response"]["status"] == "completed"
        with pytest.raises(WebSocketDisconnect) as closed:
            client.next()
        assert closed.value.code == 1012
