"""What a gateway replica counts of each bundle: requests under way, failures, and how long the first sound took."""

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve import visits
from serve.encoder import Heard, Refused
from serve.errors import ApiError
from serve.meters import Meters
from serve.pipeline import Pipeline
from serve.prompting import Reply, Task, TooLong, Unfolded
from serve.visits import Visit
from serve.vocoder import Line
from serve.voice import Manner, Sound, Voiced

STREAMED, WHOLE = "streamed", "whole"
"""Kinds of spoken answers, whose times are not compared with each other: a whole one sounds when all of it is made."""
_TIMES = 1000
"""Remembered of each kind, the latest."""


def _times() -> dict[str, deque[float]]:
    return {STREAMED: deque(maxlen=_TIMES), WHOLE: deque(maxlen=_TIMES)}


@dataclass
class Figures:
    """Of one bundle. answered: requests that are over, and answers within sessions; failed: those of them that broke.

    ongoing: requests and sessions under way. seconds: of work until the first sound, by kind.
    """

    answered: int = 0
    failed: int = 0
    ongoing: int = 0
    seconds: dict[str, deque[float]] = field(default_factory=_times)

    @classmethod
    def total(cls, parts: Iterable["Figures"]) -> "Figures":
        whole = cls(seconds={STREAMED: deque(), WHOLE: deque()})
        for part in parts:
            whole.answered += part.answered
            whole.failed += part.failed
            whole.ongoing += part.ongoing
            for kind, seconds in part.seconds.items():
                whole.seconds[kind].extend(seconds)
        return whole


class Tally:
    """Figures by bundle digest."""

    def __init__(self) -> None:
        self.bundles: dict[str, Figures] = {}

    def of(self, digest: str) -> Figures:
        return self.bundles.setdefault(digest, Figures())

    def restart(self) -> None:
        """Count from zero; what is under way stays so."""
        self.bundles = {
            digest: Figures(ongoing=past.ongoing) for digest, past in self.bundles.items() if past.ongoing > 0
        }

    def begin(self, digest: str) -> None:
        self.of(digest).ongoing += 1

    def end(self, visit: Visit, status: int) -> None:
        """Whatever the visit was, its bundle has one less under way; a request that came to its models is counted."""
        if not visit.bundle:
            return
        self.of(visit.bundle).ongoing -= 1
        if visit.asked and visit.kind == "request":
            self.answered(visit.bundle, failed=visit.failed or status >= 500)

    def answered(self, digest: str, *, failed: bool) -> None:
        figures = self.of(digest)
        figures.answered += 1
        figures.failed += failed

    def took(self, digest: str, kind: str, seconds: float) -> None:
        self.of(digest).seconds[kind].append(seconds)


class Tallied:
    """A pipeline whose work is counted.

    Time in which it waits for the client is no work: within a session, a turn's first sound is late by what its own
    steps took.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        digest: str,
        tally: Tally,
        meters: Meters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipeline = pipeline
        self._meters = meters
        self._digest = digest
        self._tally = tally
        self._clock = clock

    async def hear(self, clip: bytes) -> Heard | Refused:
        with self._step("hear"):
            return await self._pipeline.hear(clip)

    async def reply(self, task: Task) -> Reply | TooLong:
        with self._step("answer", answers=True):
            return await self._pipeline.reply(task)

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        with self._step("speak") as visit:
            said = await self._pipeline.speak(line, format, rate)
        self._heard(visit, WHOLE, 0.0)
        return said

    async def unfold(self, task: Task) -> AsyncGenerator[Unfolded, None]:
        with self._step("answer", answers=True):
            async with aclosing(self._pipeline.unfold(task)) as pieces:
                async for piece in pieces:
                    yield piece

    async def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        began, silent = self._clock(), True
        with self._step("answer aloud", answers=True) as visit:
            async with aclosing(self._pipeline.voice(task, manner)) as pieces:
                async for piece in pieces:
                    if silent and isinstance(piece, Sound):
                        silent = False
                        self._heard(visit, STREAMED, self._clock() - began)
                    yield piece
        # How long the rest took, its listener decided.
        visit.worked = 0.0

    def _heard(self, visit: Visit, kind: str, seconds: float) -> None:
        self._tally.took(self._digest, kind, visit.worked + seconds)
        self._meters.first_audio(visit.kind, kind, visit.worked + seconds)
        visit.worked = 0.0

    @contextmanager
    def _step(self, stage: str, *, answers: bool = False) -> Iterator[Visit]:
        """answers: it is what a turn of a session comes to."""
        visit, began = visits.current(), self._clock()
        visit.asked = True
        failed: bool | None = None
        try:
            with self._meters.stage(stage):
                yield visit
            failed = False if answers else None
        except Exception as error:
            failed = _is_fault(error)
            raise
        finally:
            visit.worked += self._clock() - began
            if visit.kind == "session" and failed is not None:
                self._tally.answered(self._digest, failed=failed)
            elif failed:
                visit.failed = True


def _is_fault(error: Any) -> bool:
    """Whether it tells against the bundle. That it has no room tells, too: another might have."""
    return not isinstance(error, ApiError) or error.status >= 500 or error.code == "at_capacity"
