"""Server-sent events in the shapes that OpenAI's clients read."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from serve.service import PCM_RATE, ChatAnswer

DONE = "data: [DONE]\n\n"
_PCM_CHUNK = PCM_RATE * 2 // 5
"""Bytes in one audio event: 0.2 s of 16-bit samples."""


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def chat_events(head: dict[str, Any], answer: ChatAnswer, usage: dict[str, Any] | None) -> Iterator[str]:
    """`chat.completion.chunk` events of one answer, `[DONE]` last.

    head: what all chunks share (id, created, model…). usage: sent in a chunk of its own, if not None.
    """

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    text = answer.reply.text or ""
    if audio := answer.audio:
        yield chunk({"role": "assistant", "audio": {"id": audio.id, "transcript": ""}})
        for piece in words(text):
            yield chunk({"audio": {"transcript": piece}})
        for data in slices(audio.data):
            yield chunk({"audio": {"data": data}})
        yield chunk({"audio": {"expires_at": audio.expires_at}})
    else:
        yield chunk({"role": "assistant", "content": ""})
        for piece in words(text):
            yield chunk({"content": piece})
    yield chunk({}, answer.reply.finish)
    if usage is not None:
        yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield DONE


def speech_events(data: bytes, usage: dict[str, int]) -> Iterator[str]:
    for piece in slices(data):
        yield event({"type": "speech.audio.delta", "audio": piece})
    yield event({"type": "speech.audio.done", "usage": usage})


def transcript_events(text: str, usage: dict[str, Any]) -> Iterator[str]:
    for piece in words(text):
        yield event({"type": "transcript.text.delta", "delta": piece})
    yield event({"type": "transcript.text.done", "text": text, "usage": usage})


def words(text: str) -> list[str]:
    """Pieces that join to the text again."""
    first, *rest = text.split(" ")
    return [piece for piece in (first, *(f" {word}" for word in rest)) if piece]


def slices(data: bytes) -> Iterator[str]:
    """Base64, each slice decodable by itself and of whole samples."""
    for start in range(0, len(data), _PCM_CHUNK):
        yield base64.b64encode(data[start : start + _PCM_CHUNK]).decode()
