"""How a promotion learns what gateway replicas count: they tell an actor of its, which lives as long as it does."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.shared import NAMESPACE
from serve.tally import Figures, Tally

ACTOR = "speechgpt-promotion"
"""One name: there is one promotion at a time."""
EVERY_SECONDS = 0.5
FRESH_SECONDS = 10.0
"""A replica that has said nothing for so long is gone, and what was under way there with it."""
_NOBODY_SECONDS = 5.0


@dataclass
class Report:
    """replica: of the gateway. watch: of the target that it goes by. figures: by digest, since it does. at: clock."""

    replica: str
    watch: str
    figures: dict[str, Figures]
    at: float = 0.0


class Reports:
    """The latest of each replica for the newest watch; older ones are of a state that is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watch = ""
        self._reports: dict[str, Report] = {}

    def expect(self, watch: str) -> None:
        self._watch = watch
        self._reports = {}

    def put(self, report: Report) -> None:
        if report.watch == self._watch:
            report.at = self._clock()
            self._reports[report.replica] = report

    def figures(self) -> dict[str, Figures]:
        """By digest, over all replicas that there were; under way only where a replica still says so."""
        oldest = self._clock() - FRESH_SECONDS
        parts: dict[str, list[Figures]] = {}
        for report in self._reports.values():
            for digest, part in report.figures.items():
                told = part if report.at > oldest else Figures(part.answered, part.failed, 0, part.seconds)
                parts.setdefault(digest, []).append(told)
        return {digest: Figures.total(some) for digest, some in parts.items()}

    def replicas(self) -> set[str]:
        """Those that go by the newest target and said so lately."""
        oldest = self._clock() - FRESH_SECONDS
        return {report.replica for report in self._reports.values() if report.at > oldest}


class Reporter:
    """Tells what a replica's tally says while somebody watches."""

    def __init__(self, replica: str, tally: Tally) -> None:
        self._replica = replica
        self._tally = tally
        self._task: asyncio.Task[None] | None = None

    def follow(self, watch: str) -> None:
        """From now on for this watch, from zero; "" is nobody. To be called in the event loop."""
        if self._task:
            self._task.cancel()
        self._tally.restart()
        self._task = asyncio.create_task(self._tell(watch)) if watch else None

    async def _tell(self, watch: str) -> None:
        while True:
            # A copy, because a thread sends it.
            figures = {digest: Figures.total([part]) for digest, part in self._tally.bundles.items()}
            report = Report(self._replica, watch, figures)
            # A promotion that was killed leaves its watch behind, and nobody who listens.
            listened = await asyncio.to_thread(_send, report)
            await asyncio.sleep(EVERY_SECONDS if listened else _NOBODY_SECONDS)


def _send(report: Report) -> bool:
    import ray

    try:
        actor: Any = ray.get_actor(ACTOR, NAMESPACE)
    except ValueError:
        return False
    actor.put.remote(report)
    return True
