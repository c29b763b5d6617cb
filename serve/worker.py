"""The thread in which a replica's model runs, so that its event loop stays free for requests and health checks."""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_TURN_SECONDS, _NICENESS = 0.0002, 4
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20
"""The name is that of glibc's malloc.h."""


def give_way() -> None:
    """For a thread that computes, when it begins: event loops come first, of this process and of others on its node.

    The interpreter changes hands after 0.2 ms instead of Python's 5: such a thread leaves it for each of PyTorch's
    operations, a hundred of them a token, and waits as long as that to get it back from a loop that delivers tokens;
    eight answers at once took half as long again. And the thread (Linux counts niceness by thread) is the one that
    waits when processors are short: what the gateway refuses it must refuse at once.
    """
    sys.setswitchinterval(_TURN_SECONDS)
    os.nice(_NICENESS)


def give_back_memory() -> None:
    """For a process whose large tensors are of ever other sizes: the system has them back when they are freed.

    glibc does so only with what is larger than the largest that was ever freed, up to 32 MB, and the heap in which it
    keeps the rest seldom shrinks: with caches of thousands of tokens, replicas came to differ by 100 MB in minutes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class Worker:
    """Runs one batch at a time. A batch that runs longer than `stuck_seconds` makes the replica unhealthy, and Serve
    replaces it."""

    def __init__(self, stuck_seconds: float) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=give_way)
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
