"""A load of requests, and what became of each, as the official clients would take it."""

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

QUESTION = "what is two plus three"
"""To which the tiny bundles have learnt to answer in the form that is asked for."""
RETRYABLE = (408, 409, 429)
"""Statuses that OpenAI's clients try again, beside all of 500 and more, unless `x-should-retry` says no."""


@dataclass(frozen=True)
class Ask:
    """path: of the API. body: JSON, or the fields of a form when there is a clip."""

    path: str
    body: dict[str, Any]
    clip: bytes = b""


@dataclass
class Answer:
    """status: 0 when the connection broke. began, ended: `time.monotonic()`. broken: a stream that had begun did not
    end as it should. retryable: whether the official clients would try again by themselves; a broken stream they hand
    on, because their user has a part of it."""

    began: float
    status: int = 0
    ended: float = 0.0
    broken: bool = False
    retryable: bool = False
    said: str = ""

    @property
    def good(self) -> bool:
        return self.status == 200 and not self.broken

    @property
    def taken(self) -> float:
        return self.ended - self.began


@dataclass
class Load:
    """Where answers are gathered while it goes on. waiting: since when, by number, a first piece is waited for."""

    url: str
    waiting: dict[int, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, session: aiohttp.ClientSession, ask: Ask) -> Answer:
        answer = Answer(time.monotonic())
        self.waiting[id(answer)] = answer.began
        try:
            async with session.post(self.url + ask.path, **_payload(ask)) as reply:
                del self.waiting[id(answer)]
                answer.status = reply.status
                retry = reply.headers.get("x-should-retry") != "false"
                answer.retryable = retry and (reply.status in RETRYABLE or reply.status >= 500)
                body = await reply.read()
                if reply.status != 200:
                    answer.said = body.decode(errors="replace")[:200]
                elif reply.content_type == "text/event-stream":
                    answer.said = body.decode(errors="replace")[-200:]
                    answer.broken = '"error"' in answer.said or not _whole(answer.said)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            answer.said = f"{type(error).__name__}: {error}"
            # Before a reply had begun it is a connection error, which the clients try again.
            answer.broken, answer.retryable = answer.status == 200, answer.status != 200
        self.waiting.pop(id(answer), None)
        answer.ended = time.monotonic()
        self.answers.append(answer)
        return answer


def _payload(ask: Ask) -> dict[str, Any]:
    if not ask.clip:
        return {"json": ask.body}
    form = aiohttp.FormData()
    for name, value in ask.body.items():
        form.add_field(name, str(value))
    form.add_field("file", ask.clip, filename="a.wav")
    return {"data": form}


def _whole(end: str) -> bool:
    return any(mark in end for mark in ("data: [DONE]", "speech.audio.done", "transcript.text.done"))


async def open_loop(url: str, asks: Sequence[Ask], moments: Iterable[float], seconds: float) -> list[Answer]:
    """Ask at the given moments (seconds from now), whatever has been answered by then; the asks in turn."""
    load = Load(url)
    async with _session(seconds) as session:
        began, tasks = time.monotonic(), []
        for number, moment in enumerate(moments):
            await asyncio.sleep(max(0.0, moment - (time.monotonic() - began)))
            tasks.append(asyncio.create_task(load.ask(session, asks[number % len(asks)])))
        await asyncio.gather(*tasks)
    return load.answers


async def closed_loop(
    url: str,
    asks: Sequence[Ask],
    clients: int,
    going_on: Callable[[], bool],
    seconds: float,
    meanwhile: Callable[[Load], Awaitable[None]] | None = None,
) -> list[Answer]:
    """So many clients, each asking again when it is answered, while `going_on`. meanwhile: runs beside them."""
    load = Load(url)
    async with _session(seconds) as session:

        async def client(number: int) -> None:
            while going_on():
                answer = await load.ask(session, asks[number % len(asks)])
                number += clients
                if answer.status == 429 or not answer.status:
                    # As an honest client would, and so that a service that is gone is not asked a thousand times.
                    await asyncio.sleep(0.2)

        work = [client(number) for number in range(clients)]
        await asyncio.gather(*work, *([meanwhile(load)] if meanwhile else []))
    return load.answers


def _session(seconds: float) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=seconds)
    # Each request by a connection of its own: a pool would hide which replica or proxy is gone.
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))


def chat(
    model: str, *, stream: bool = False, spoken: bool = False, tokens: int | None = None, clip: bytes = b""
) -> Ask:
    """clip: asks in place of the question in words."""
    heard = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": [heard] if clip else QUESTION}]}
    body |= {"stream": stream} | ({"max_completion_tokens": tokens} if tokens else {})
    if spoken:
        body |= {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    return Ask("/v1/chat/completions", body)


def speech(model: str, format: str = "pcm") -> Ask:
    return Ask("/v1/audio/speech", {"model": model, "voice": "alloy", "input": "two plus", "response_format": format})


def transcription(model: str, clip: bytes) -> Ask:
    return Ask("/v1/audio/transcriptions", {"model": model}, clip)


def percentile(values: Sequence[float], share: float) -> float:
    import numpy as np

    return round(float(np.percentile(values, share)), 3) if values else 0.0


def written_down(answers: Sequence[Answer]) -> str:
    """Counts of statuses, for a report."""
    counts: dict[str, int] = {}
    for answer in answers:
        name = f"{answer.status}{' broken' if answer.broken else ''}"
        counts[name] = counts.get(name, 0) + 1
    return json.dumps(dict(sorted(counts.items())))
