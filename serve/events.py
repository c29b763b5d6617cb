"""Server-sent events in the shapes that OpenAI's clients read."""

import asyncio
import base64
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from serve.errors import ApiError, described
from serve.prompting import Reply, Words
from serve.service import PCM_RATE, Kept, LiveAnswer, LivePiece
from serve.voice import Sound
from serve.wire import Reading, Transcript

logger = logging.getLogger("ray.serve")

DONE = "data: [DONE]\n\n"
_PCM_CHUNK = PCM_RATE * 2 // 5
"""Bytes in one audio event: 0.2 s of 16-bit samples."""


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


async def chat_events(
    head: dict[str, Any],
    answer: LiveAnswer,
    usage: Callable[[Reply], dict[str, Any]] | None,
    reading: Callable[[Reply], Reading],
) -> AsyncGenerator[str, None]:
    """`chat.completion.chunk` events of one answer as its pieces come, `[DONE]` last.

    head: what all chunks share (id, created, model…). usage: what a chunk of its own at the end tells, if not None.
    reading: what the last chunk before that carries in `speechgpt`, as a whole reply does; what is understood of a
    spoken question comes as it is understood, in `delta.speechgpt`.
    """

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    spoken = answer.audio_id is not None
    audio = {"id": answer.audio_id, "transcript": ""}
    yield chunk({"role": "assistant", "audio": audio} if spoken else {"role": "assistant", "content": ""})
    async with aclosing(answer.pieces) as pieces:
        async for piece in pieces:
            match piece:
                case Words("transcript", text):
                    yield chunk({"speechgpt": {"question_transcript": text}})
                case Words(_, text):
                    yield chunk({"audio": {"transcript": text}} if spoken else {"content": text})
                case Sound(data):
                    yield chunk({"audio": {"data": base64.b64encode(data).decode()}})
                case Kept(expires_at):
                    yield chunk({"audio": {"expires_at": expires_at}})
                case Reply():
                    yield chunk({}, piece.finish, speechgpt=reading(piece).model_dump())
                    if usage is not None:
                        yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage(piece)})
    yield DONE


async def live_speech_events(
    pieces: AsyncGenerator[Sound | Reply, None], usage: Callable[[Reply], dict[str, int]]
) -> AsyncGenerator[str, None]:
    """`speech.audio.delta` events as the sound comes, `speech.audio.done` last."""
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Sound):
                yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece.data).decode()})
            else:
                yield event(_speech_done(usage, piece))


async def speech_bytes(pieces: AsyncGenerator[Sound | Reply, None]) -> AsyncGenerator[bytes, None]:
    """The sound alone, as it comes."""
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Sound):
                yield piece.data


def speech_events(data: bytes, reply: Reply, usage: Callable[[Reply], dict[str, int]]) -> Iterator[str]:
    """The same events of a file that is whole."""
    for piece in slices(data):
        yield event({"type": "speech.audio.delta", "audio": piece})
    yield event(_speech_done(usage, reply))


def _speech_done(usage: Callable[[Reply], dict[str, int]], reply: Reply) -> dict[str, Any]:
    """finish_reason: not OpenAI's; `length` where the text is longer than what was said."""
    return {"type": "speech.audio.done", "usage": usage(reply), "finish_reason": reply.finish}


async def told_of_faults(events: AsyncGenerator[str, None], until: float = math.inf) -> AsyncGenerator[str, None]:
    """A fault in the middle of a stream as its last event, in the shape that makes OpenAI's clients raise APIError.

    until: `time.monotonic()` at which not being done is one. Whoever cut the stream off could not say so any more.
    """
    try:
        async with aclosing(events):
            while True:
                async with asyncio.timeout(None if until == math.inf else until - time.monotonic()):
                    line = await anext(events, None)
                if line is None:
                    return
                yield line
    except ApiError as error:
        yield event(error.body())
    except TimeoutError:
        yield event(ApiError(504, "The answer was not done in time.", code="deadline_exceeded").body())
    except Exception as error:  # noqa: BLE001 - logged in words of our own
        logger.error("a stream broke: %s", described(error))
        yield event(ApiError(500, "The server failed to answer; its log has the reason.", code="internal_error").body())


async def transcript_events(
    pieces: AsyncGenerator[LivePiece, None], transcript: Callable[[Reply], Transcript]
) -> AsyncGenerator[str, None]:
    """`transcript.text.delta` events as the words are understood, `transcript.text.done` last."""
    async with aclosing(pieces):
        async for piece in pieces:
            match piece:
                case Words(_, text):
                    yield event({"type": "transcript.text.delta", "delta": text})
                case Reply():
                    done = {"type": "transcript.text.done", **transcript(piece).model_dump()}
                    yield event({**done, "finish_reason": piece.finish})


def slices(data: bytes) -> Iterator[str]:
    """Base64, each slice decodable by itself and of whole samples."""
    for start in range(0, len(data), _PCM_CHUNK):
        yield base64.b64encode(data[start : start + _PCM_CHUNK]).decode()
