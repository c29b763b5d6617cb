"""Sound that waits at the same time is worked on together, and counted, because autoscaling goes by it."""

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ray import serve

from speechgpt.runtime.config import SoundDeploymentSection

T = TypeVar("T")
R = TypeVar("R")
SOUND_SECONDS = "sound_seconds"
"""What replicas tell Ray Serve's autoscaler beside their requests."""


class Backlog:
    """Seconds of sound that a replica has in hand, waiting or worked on."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def holding(self, seconds: float) -> Iterator[None]:
        self._seconds += seconds
        try:
            yield
        finally:
            self._seconds -= seconds

    def stats(self) -> dict[str, float]:
        """For `record_autoscaling_stats`, which Ray Serve calls."""
        return {SOUND_SECONDS: self._seconds}


class Batched(Generic[T, R]):
    """`work` as a function of one item: called with items that came within the section's waiting time, up to its
    seconds of sound, or with one that is longer. seconds: of an item."""

    def __init__(
        self,
        work: Callable[[list[T]], Coroutine[Any, Any, list[R]]],
        seconds: Callable[[T], float],
        section: SoundDeploymentSection,
        backlog: Backlog,
    ) -> None:
        self._seconds, self._backlog = seconds, backlog
        # Ray counts in whole numbers, and warns of a batch for which too few requests may come at once.
        most = section.max_ongoing_requests

        def size(items: list[T]) -> int:
            parts = math.ceil(sum(map(seconds, items)) / section.batch_seconds * most)
            # It also refuses an item that is larger than a batch.
            return min(parts, most) if len(items) == 1 else parts

        self._batch: Callable[[T], Awaitable[R]] = serve.batch(
            max_batch_size=most, batch_wait_timeout_s=section.batch_wait_seconds, batch_size_fn=size
        )(work)

    async def __call__(self, item: T) -> R:
        with self._backlog.holding(self._seconds(item)):
            return await self._batch(item)
