"""Spoken answers that a later turn may refer to by `audio.id`, shared by every gateway replica."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve.shared import shared, started, told

ACTOR = "speechgpt-memory"


@dataclass(frozen=True)
class Exchange:
    """What is remembered of a spoken answer: its words, and the words that it answered. The model's history is text."""

    question: str
    answer: str


class Memory:
    """Exchanges by audio id, each for `ttl_seconds`; above `capacity` the oldest go first."""

    def __init__(self, ttl_seconds: float, capacity: int, clock: Callable[[], float] = time.time) -> None:
        self._ttl_seconds = ttl_seconds
        self._capacity = capacity
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, Exchange]] = OrderedDict()

    def keep(self, audio_id: str, exchange: Exchange) -> int:
        """Unix time, in seconds, until which the id resolves."""
        self._forget_old()
        expires_at = self._clock() + self._ttl_seconds
        self._entries[audio_id] = (expires_at, exchange)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return int(expires_at)

    def recall(self, audio_id: str) -> Exchange | None:
        self._forget_old()
        entry = self._entries.get(audio_id)
        return entry[1] if entry else None

    def _forget_old(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values()))[0] <= now:
            self._entries.popitem(last=False)


class Recollection(Protocol):
    """Memory as the gateway uses it, wherever it lives."""

    async def keep(self, audio_id: str, exchange: Exchange) -> int: ...

    async def recall(self, audio_id: str) -> Exchange | None: ...


class SharedMemory:
    """The one Memory of the cluster (`shared`). Without it `keep` and `recall` raise ApiError 503, worth a retry."""

    def __init__(self, ttl_seconds: float, capacity: int) -> None:
        self._actor = shared(Memory, ACTOR, ttl_seconds, capacity)

    async def started(self) -> None:
        await started(self._actor)

    async def keep(self, audio_id: str, exchange: Exchange) -> int:
        return await told(self._actor.keep.remote(audio_id, exchange), "remember the answer")

    async def recall(self, audio_id: str) -> Exchange | None:
        return await told(self._actor.recall.remote(audio_id), "look for that answer")


class OwnMemory:
    """A Memory of this process alone, for Serve's local testing mode."""

    def __init__(self, ttl_seconds: float, capacity: int) -> None:
        self._memory = Memory(ttl_seconds, capacity)

    async def keep(self, audio_id: str, exchange: Exchange) -> int:
        return self._memory.keep(audio_id, exchange)

    async def recall(self, audio_id: str) -> Exchange | None:
        return self._memory.recall(audio_id)
