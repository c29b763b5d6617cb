"""A service under all kinds of requests at once, and what becomes of its processes."""

import asyncio
import base64
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
from hostile_clients import as_json, moments
from live_service import LiveService, alive_actors, live_service, until
from load import Answer, Ask, Load, chat, closed_loop, percentile, speech, transcription, written_down

from speechgpt.recipe import Recipe
from speechgpt.speech.audio import decode, encode

CLIENTS = 4
SAMPLES = 40
"""Looks at the processes, evenly over the time."""
_MEBIBYTE = 1 << 20
_EXPORTED_SECONDS = 20
_RATE = 24_000
_TASKS = 8
"""Of asyncio, by which Ray's own loops differ from one look to the next."""


@dataclass(frozen=True)
class Look:
    """One process at one moment. rss: bytes."""

    rss: int
    files: int
    threads: int


@dataclass
class Found:
    """looks: of each process, over the time. ongoing: when all clients had gone. actors, tasks: before and after;
    tasks are those of all event loops of proxy and replicas, as Ray counts them."""

    seconds: float
    looks: dict[str, list[Look]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    ongoing: dict[str, int] = field(default_factory=dict)
    actors: tuple[int, int] = (0, 0)
    tasks: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))
    vanished: int = 0
    sessions: int = 0

    def grown(self, what: str) -> dict[str, float]:
        """How much more there was of it in the last quarter than in the second, medians; the first is warming up."""
        return {name: _median(looks, what, 0.75, 1.0) - _median(looks, what, 0.25, 0.5)
                for name, looks in self.looks.items()}  # fmt: skip

    def figures(self) -> dict[str, Any]:
        return {
            "answers": written_down(self.answers),
            "clients that vanished": self.vanished,
            "realtime sessions": self.sessions,
            "seconds until answered, p50 p95": [
                percentile([one.taken for one in self.answers if one.good], share) for share in (50, 95)
            ],
            "MiB at the end": {name: looks[-1].rss >> 20 for name, looks in self.looks.items()},
            "MiB more in the last quarter than in the second": {
                name: round(grown / _MEBIBYTE, 1) for name, grown in self.grown("rss").items()
            },
            "files more": self.grown("files"),
            "threads more": self.grown("threads"),
            "actors before and after": self.actors,
            "tasks before and after": tuple(sum(each.values()) for each in self.tasks),
            "tasks more, by loop": self.tasks_more(),
        }

    def tasks_more(self) -> dict[str, float]:
        before, after = self.tasks
        return {loop: count - before.get(loop, 0) for loop, count in after.items() if count > before.get(loop, 0)}

    def check(self) -> None:
        """Raises AssertionError."""
        wrong = [one for one in self.answers if one.status not in (200, 400, 404, 413, 429) or one.broken]
        assert not wrong, wrong[:5]
        assert sum(one.good for one in self.answers) >= CLIENTS and self.sessions > 1
        assert not any(self.ongoing.values()), self.ongoing
        # Half of the time lies between the quarters: an honest warm-up is over, a leak of each request goes on.
        rss = {name: grown for name, grown in self.grown("rss").items() if grown > 24 * _MEBIBYTE}
        assert not rss, f"bytes more: {rss}"
        # Connections of clients that are there at one look and not at the other are files, too.
        files = {name: grown for name, grown in self.grown("files").items() if grown > 3 * CLIENTS}
        assert not files, f"files more: {files}"
        threads = {name: grown for name, grown in self.grown("threads").items() if grown > 2 * CLIENTS}
        assert not threads, f"threads more: {threads}"
        assert self.actors[0] == self.actors[1], f"actors before and after: {self.actors}"
        before, after = (sum(each.values()) for each in self.tasks)
        assert 0 < after <= before + _TASKS, f"tasks before and after: {before}, {after}; {self.tasks_more()}"


def mixed_load(bundle: Path, recipe: Recipe, clip: bytes, seconds: float) -> Found:
    """Load a service for so long, and look at it meanwhile; before that it is warmed by a third of the same."""
    with live_service(bundle, recipe) as service:
        _loaded(service, clip, seconds / 3)
        # Ray's exporter is some seconds behind.
        time.sleep(_EXPORTED_SECONDS)
        actors, tasks = _actors(), _tasks(service)
        found = _loaded(service, clip, seconds)
        until(lambda: _actors() == actors, 30)
        until(lambda: sum(_tasks(service).values()) <= sum(tasks.values()) + _TASKS, 60, 2)
        found.actors, found.tasks = (actors, _actors()), (tasks, _tasks(service))
    return found


def _loaded(service: LiveService, clip: bytes, seconds: float) -> Found:
    """Returns when nothing is worked on."""
    found, end = Found(seconds), time.monotonic() + seconds

    def going_on() -> bool:
        return time.monotonic() < end

    async def meanwhile(load: Load) -> None:
        watching = _watch(service, found, end, seconds / SAMPLES)
        await asyncio.gather(watching, _vanish(service, found, going_on), _converse(load, found, clip, going_on))

    found.answers = asyncio.run(closed_loop(service.url, _asks("tiny", clip), CLIENTS, going_on, 120, meanwhile))
    until(lambda: not any(service.ongoing().values()), 30)
    found.ongoing = service.ongoing()
    return found


def _asks(model: str, clip: bytes) -> list[Ask]:
    """Every kind; some that are to be refused."""
    return [
        chat(model),
        chat(model, stream=True),
        chat(model, spoken=True),
        chat(model, spoken=True, stream=True),
        speech(model, "pcm"),
        speech(model, "mp3"),
        speech(model, "wav"),
        transcription(model, clip),
        chat(model, clip=clip),
        chat(model, clip=clip, spoken=True, stream=True),
        transcription(model, b"no sound at all" * 9),
        chat("another"),
        Ask("/v1/audio/speech", {"model": model, "voice": "alloy", "input": "x" * 1000}),
        Ask("/v1/audio/transcriptions", {"model": model}, bytes(3_000_000)),
        chat(model, spoken=True, stream=True, tokens=5),
    ]


async def _vanish(service: LiveService, found: Found, going_on: Any) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    spoken = asked | {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    requests = [as_json("/v1/chat/completions", body) for body in (asked, spoken)]
    clients = iter(moments(requests, 10**5, seed=7))
    while going_on():
        with suppress(TimeoutError, OSError):
            await asyncio.wait_for(next(clients).run(service.url), 20)
        found.vanished += 1
        await asyncio.sleep(0.1)


async def _converse(load: Load, found: Found, clip: bytes, going_on: Any) -> None:
    """Realtime sessions, one after the other: a spoken question is answered, then a second one, and every third client
    vanishes while it is answered."""
    turn = encode(decode(clip), "pcm", _RATE) + bytes(_RATE * 2)
    asked = [base64.b64encode(turn[start : start + _RATE]).decode() for start in range(0, len(turn), _RATE)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as client:
        while going_on():
            answer = Answer(time.monotonic())
            try:
                async with client.ws_connect(f"{load.url}/v1/realtime?model=tiny") as socket:
                    answer.status = 200
                    for patience in ("response.done", "response.done" if found.sessions % 3 else "response.created"):
                        for piece in asked:
                            await socket.send_json({"type": "input_audio_buffer.append", "audio": piece})
                        while (event := await socket.receive_json(timeout=60))["type"] != patience:
                            answer.broken |= event["type"] == "error"
                        done = event["response"]["status"] in ("completed", "incomplete", "in_progress")
                        answer.broken, answer.said = answer.broken or not done, str(event)[:200]
            except (aiohttp.ClientError, TypeError, TimeoutError) as error:
                answer.broken, answer.said = True, f"{type(error).__name__}: {error}"
            answer.ended = time.monotonic()
            load.answers.append(answer)
            found.sessions += 1


async def _watch(service: LiveService, found: Found, end: float, every: float) -> None:
    processes = {f"{one.deployment}": psutil.Process(one.pid) for one in service.replicas()}
    processes["Proxy"] = service.proxy()
    while time.monotonic() < end:
        for name, process in processes.items():
            look = Look(process.memory_info().rss, process.num_fds(), process.num_threads())
            found.looks.setdefault(name, []).append(look)
        await asyncio.sleep(every)


def _actors() -> int:
    """That live."""
    return len(alive_actors())


def _tasks(service: LiveService) -> dict[str, float]:
    page = httpx.get(f"{service.url}/metrics", timeout=60).text
    found = [line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("ray_serve_event_loop_tasks{")]
    return {loop: float(count) for loop, count in found}


def _median(looks: list[Look], what: str, start: float, end: float) -> float:
    values = sorted(getattr(look, what) for look in looks[int(len(looks) * start) : int(len(looks) * end)])
    return values[len(values) // 2]
