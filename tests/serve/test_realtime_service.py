"""The official OpenAI client's `realtime.connect` against a real Ray Serve."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import websockets
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from openai.types.realtime import RealtimeServerEvent

pytestmark = pytest.mark.ray

QUESTION = "what is two plus three"


def voice(seconds: float, glide: float) -> bytes:
    """16-bit samples at 24 kHz: a gliding tone in syllables."""
    time = np.arange(int(seconds * 24_000)) / 24_000
    wave = 0.4 * np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * (200 + glide * time) * time)
    return (wave * 32767).astype("<i2").tobytes()


def silence(seconds: float) -> bytes:
    return bytes(int(seconds * 24_000) * 2)


@asynccontextmanager
async def session(service_url: str, **settings: Any) -> AsyncIterator[AsyncRealtimeConnection]:
    client = openai.AsyncOpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0)
    async with client.realtime.connect(model="tiny") as connection:
        assert (await connection.recv()).type == "session.created"
        await connection.session.update(session={"type": "realtime", **settings})
        assert (await connection.recv()).type == "session.updated"
        yield connection


async def speak(connection: AsyncRealtimeConnection, sound: bytes) -> None:
    for start in range(0, len(sound), 9_600):
        await connection.input_audio_buffer.append(audio=base64.b64encode(sound[start : start + 9_600]).decode())


async def ask(connection: AsyncRealtimeConnection, text: str) -> None:
    item: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    await connection.conversation.item.create(item=item)
    await connection.response.create()


async def until(connection: AsyncRealtimeConnection, *types: str) -> list[RealtimeServerEvent]:
    """The events up to the first of one of `types`, which is the last."""
    seen: list[RealtimeServerEvent] = []
    async with asyncio.timeout(120):
        while not seen or seen[-1].type not in types:
            seen.append(await connection.recv())
    return seen


def within(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 300))


def test_asked_by_voice_it_answers_by_voice(service_url: str) -> None:
    async def talk() -> None:
        transcribed: Any = {"input": {"transcription": {"model": "tiny"}}}
        async with session(service_url, audio=transcribed) as connection:
            await speak(connection, silence(0.5) + voice(1.2, 150) + silence(1))
            events = await until(connection, "response.done")
            done = events[-1]
            assert done.type == "response.done" and done.response.status == "completed"
            sound = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
            words = "".join(e.delta for e in events if e.type == "response.output_audio_transcript.delta")
            assert len(sound) > 4_800 and words
            completed = "conversation.item.input_audio_transcription.completed"
            rest = await until(connection, completed)
            assert rest[-1].type == completed and rest[-1].transcript

    within(talk())


def test_asked_in_text_it_answers_in_text_and_remembers(service_url: str) -> None:
    async def talk() -> None:
        async with session(service_url, output_modalities=["text"]) as connection:
            read: list[int] = []
            for _ in range(2):
                await ask(connection, QUESTION)
                events = await until(connection, "response.done")
                assert events[-1].type == "response.done" and events[-1].response.status == "completed"
                assert "".join(e.delta for e in events if e.type == "response.output_text.delta")
                assert events[-1].response.usage and events[-1].response.usage.input_tokens
                read.append(events[-1].response.usage.input_tokens)
            assert read[1] > read[0]

    within(talk())


def test_whoever_speaks_interrupts(service_url: str, tiny_bundle: Path) -> None:
    from ray import serve

    from serve.app import application_name
    from serve.bundles import find

    async def talk() -> None:
        async with session(service_url) as connection:
            for _ in range(5):
                # One behind the other, so that the voice is there long before an answer can be done.
                await ask(connection, QUESTION)
                await speak(connection, silence(0.2) + voice(0.5, 150))
                events = await until(connection, "response.done")
                done = events[-1]
                assert done.type == "response.done"
                if done.response.status == "cancelled":
                    break
                # It was done all the same: its turn goes by unanswered.
                await connection.input_audio_buffer.clear()
            assert done.response.status_details and done.response.status_details.reason == "turn_detected"
            assert "input_audio_buffer.speech_started" in [event.type for event in events]
            # The rest of the turn is answered.
            await speak(connection, voice(0.5, 150) + silence(1))
            events = await until(connection, "response.done")
            assert events[-1].type == "response.done" and events[-1].response.status == "completed"

    within(talk())
    language = serve.get_deployment_handle("LanguageModel", application_name(find(str(tiny_bundle), "")))
    until_then = time.monotonic() + 30
    while language.ongoing.remote().result() and time.monotonic() < until_then:
        time.sleep(0.1)
    assert language.ongoing.remote().result() == 0


def test_two_sessions_hear_only_their_own(service_url: str) -> None:
    async def talk(glide: float) -> list[np.ndarray]:
        """What two answers sound like, int16."""
        transcribed: Any = {"input": {"transcription": {"model": "tiny"}, "turn_detection": None}}
        heard: list[np.ndarray] = []
        async with session(service_url, audio=transcribed) as connection:
            # Untrained weights answer some questions without a sound.
            for number in range(12):
                await speak(connection, voice(1.2, glide + 7 * number))
                await connection.input_audio_buffer.commit()
                await connection.response.create()
                events = await until(connection, "response.done")
                mine = {e.item_id for e in events if e.type == "input_audio_buffer.committed"}
                assert len(mine) == 1
                [created] = [e for e in events if e.type == "response.created"]
                assert {named for e in events if (named := getattr(e, "response_id", None))} == {created.response.id}
                data = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
                if data:
                    heard.append(np.frombuffer(data, "<i2"))
                if len(heard) == 2:
                    break
        return heard

    async def both() -> None:
        alone = [*await talk(150), *await talk(-60)]
        assert len({sound.tobytes() for sound in alone}) == 4
        first, second = await asyncio.gather(talk(150), talk(-60))
        for sound, expected in zip([*first, *second], alone, strict=True):
            np.testing.assert_allclose(sound, expected, rtol=0, atol=2)

    within(both())


def test_another_model_is_not_served_here(service_url: str) -> None:
    async def connect() -> None:
        client = openai.AsyncOpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with client.realtime.connect(model="gpt-realtime"):
                pass
        assert refused.value.response.status_code == 404
        assert b"model_not_found" in (refused.value.response.body or b"")

    within(connect())
