"""Replicas come with the load and go with it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_service import LiveService, live_service, until
from load import Load, chat, closed_loop, written_down

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

REPORTS = Path(__file__).parents[3] / "reports"
FLOOR, CEILING, CLIENTS = 1, 3, 12
LONGEST = 600.0


def test_replicas_follow_the_load(
    endless_bundle: Path, tiny: Recipe, ray_cluster: None, record_property: Callable[[str, object], None]
) -> None:
    """Under load the language model's replicas go from one to three, afterwards back to one."""
    language = tiny.serving.language.model_copy(
        update={
            "min_replicas": FLOOR, "max_replicas": CEILING, "target_ongoing_requests": 2, "max_ongoing_requests": 4,
            "max_queued_requests": 64, "batch": 4, "cpus": 0.2, "upscale_delay_seconds": 5,
            "downscale_delay_seconds": 15,
        }
    )  # fmt: skip
    ask = chat("endless", spoken=True, stream=True, tokens=300)
    course = Course()
    with live_service(endless_bundle, tiny, language=language) as service:
        assert len(service.replicas("LanguageModel")) == FLOOR
        answers = asyncio.run(
            closed_loop(service.url, [ask], CLIENTS, lambda: not course.seen, LONGEST, course.watching(service))
        )
        ended = time.monotonic()
        course.load_until = ended - course.began
        assert until(lambda: course.note(service, None) == FLOOR, LONGEST, 0.5), "it does not come back to the floor"
        back = time.monotonic() - ended
        again = asyncio.run(closed_loop(service.url, [ask], 1, _times(1), LONGEST))
    course.plot(REPORTS / "autoscaling.png")
    record_property("answers", written_down(answers))
    record_property("seconds from the load's begin to all replicas", course.reached)
    record_property("seconds from its end to one replica", round(back, 1))
    record_property("plot", "reports/autoscaling.png")
    assert course.reached is not None, f"it had {max(course.replicas)} replicas of {CEILING}"
    assert all(answer.good for answer in (*answers, *again)), written_down(answers)


def _times(count: int) -> Any:
    left = iter(range(count))
    return lambda: next(left, None) is not None


class Course:
    """What there was over time. queued: seconds that those who wait for a first piece of an answer have waited."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: list[float] = []
        self.replicas: list[int] = []
        self.ongoing: list[int] = []
        self.queued: list[float] = []
        self.reached: float | None = None
        self.load_until = 0.0
        self.seen = False

    def watching(self, service: LiveService) -> Any:
        async def watch(load: Load) -> None:
            began = time.monotonic()
            try:
                while time.monotonic() - began < LONGEST:
                    await asyncio.to_thread(self.note, service, load)
                    if self.replicas[-1] == CEILING and self.reached is None:
                        self.reached = round(time.monotonic() - began, 1)
                    if self.reached is not None and time.monotonic() - began > self.reached + 15:
                        return
                    await asyncio.sleep(0.5)
            finally:
                self.seen = True

        return watch

    def note(self, service: LiveService, load: Load | None) -> int:
        """A look at the service. Gives the replicas that run."""
        running = service.replicas("LanguageModel")
        now = time.monotonic()
        self.seconds.append(now - self.began)
        self.replicas.append(len(running))
        self.ongoing.append(sum(replica.ongoing() for replica in running))
        self.queued.append(sum(now - since for since in load.waiting.values()) if load else 0.0)
        return len(running)

    def plot(self, file: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 7), layout="constrained")
        top, middle, bottom = figure.subplots(3, sharex=True)
        top.step(self.seconds, self.replicas, where="post")
        top.set(ylabel="replicas", ylim=(0, CEILING + 0.5), title=f"{CLIENTS} clients, then none")
        middle.plot(self.seconds, self.ongoing)
        middle.set(ylabel="requests in work")
        bottom.plot(self.seconds, self.queued)
        bottom.set(ylabel="seconds waited\nby those who wait", xlabel="seconds")
        for axes in (top, middle, bottom):
            axes.axvline(self.load_until, color="0.6", linestyle=":")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=120)
