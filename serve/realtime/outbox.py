"""Events on their way to a client: in order, whole, and no faster than the client takes them."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from serve.realtime.response import new_id

_ROOM_BYTES = 1 << 20


class Outbox:
    """`post` never waits, so that nothing can come between events that belong together; who makes many waits for `room`
    afterwards."""

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: deque[str] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    def post(self, event: dict[str, Any]) -> None:
        text = json.dumps({"event_id": new_id("event"), **event}, separators=(",", ":"))
        self._waiting.append(text)
        self._bytes += len(text)
        self._news.set()
        self._empty.clear()
        if self._bytes > _ROOM_BYTES:
            self._room.clear()

    async def room(self) -> None:
        """Returns when a client who does not read keeps no more than about 1 MiB waiting here."""
        await self._room.wait()

    async def flush(self, seconds: float) -> None:
        """Returns when everything has gone, or after so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            pass

    async def run(self) -> None:
        """Send what is posted. Raises what `send` raises."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                text = self._waiting.popleft()
                await self._send(text)
                self._bytes -= len(text)
                if self._bytes <= _ROOM_BYTES:
                    self._room.set()
            self._empty.set()
