"""The thread in which a replica's model runs, so that its event loop stays free for requests and health checks."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs one batch at a time. A batch that runs longer than `stuck_seconds` makes the replica unhealthy, and Serve
    replaces it."""

    def __init__(self, stuck_seconds: float) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._stuck_seconds = stuck_seconds
        self._busy_since: float | None = None

    async def run(self, work: Callable[[], T]) -> T:
        def timed() -> T:
            self._busy_since = time.monotonic()
            try:
                return work()
            finally:
                self._busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._executor, timed)

    def check(self) -> None:
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._stuck_seconds:
            raise RuntimeError(f"a batch has been running for more than {self._stuck_seconds:g} s")
