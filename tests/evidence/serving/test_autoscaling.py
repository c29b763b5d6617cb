"""Replicas come with the load and go with it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_service import LiveService, live_service, until
from load import Answer, Ask, Load, chat, closed_loop, transcription, written_down

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

REPORTS = Path(__file__).parents[3] / "reports"
FLOOR, CEILING, CLIENTS = 1, 3, 12
PACE = {
    "min_replicas": FLOOR, "max_replicas": CEILING, "cpus": 0.2,
    "upscale_delay_seconds": 5, "downscale_delay_seconds": 15,
}  # fmt: skip
LONGEST = 600.0


def test_replicas_follow_the_load(
    endless_bundle: Path, tiny: Recipe, ray_cluster: None, record_property: Callable[[str, object], None]
) -> None:
    """Under load the language model's replicas go from one to three, afterwards back to one."""
    language = tiny.serving.language.model_copy(
        update={**PACE, "target_ongoing_requests": 2, "max_ongoing_requests": 4, "max_queued_requests": 64, "batch": 4}
    )
    course = Course("LanguageModel")
    with live_service(endless_bundle, tiny, language=language) as service:
        course.run(service, chat("endless", spoken=True, stream=True, tokens=300))
    course.tell(record_property)


def test_replicas_follow_the_sound(
    tiny_bundle: Path, tiny: Recipe, long_clip: bytes, ray_cluster: None, record_property: Callable[[str, object], None]
) -> None:
    """Long clips bring replicas of the encoder, which by its requests alone would keep one; afterwards they go."""
    encoder = tiny.serving.encoder.model_copy(
        update={**PACE, "target_ongoing_requests": 64, "max_ongoing_requests": 64, "target_sound_seconds": 0.5}
    )
    # Who has been heard waits for words, and is not sent away.
    language = tiny.serving.language.model_copy(update={"max_queued_requests": 64})
    course = Course("Encoder")
    with live_service(tiny_bundle, tiny, encoder=encoder, language=language) as service:
        course.run(service, transcription("tiny", long_clip))
    course.tell(record_property)


def _times(count: int) -> Any:
    left = iter(range(count))
    return lambda: next(left, None) is not None


class Course:
    """A deployment under a load, and what there was over time. queued: seconds that those who wait for a first piece of
    an answer have waited."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.began = time.monotonic()
        self.answers: list[Answer] = []
        self.back = 0.0
        self.seconds: list[float] = []
        self.replicas: list[int] = []
        self.ongoing: list[int] = []
        self.queued: list[float] = []
        self.reached: float | None = None
        self.load_until = 0.0
        self.seen = False

    def run(self, service: LiveService, ask: Ask) -> None:
        """Clients until all replicas have been there for a while, then none until there is one, then one."""
        assert len(service.replicas(self.deployment)) == FLOOR
        self.answers = asyncio.run(
            closed_loop(service.url, [ask], CLIENTS, lambda: not self.seen, LONGEST, self.watching(service))
        )
        ended = time.monotonic()
        self.load_until = ended - self.began
        assert until(lambda: self.note(service, None) == FLOOR, LONGEST, 0.5), "it does not come back to the floor"
        self.back = time.monotonic() - ended
        self.answers += asyncio.run(closed_loop(service.url, [ask], 1, _times(1), LONGEST))

    def tell(self, record_property: Callable[[str, object], None]) -> None:
        plot = f"serving_autoscaling_{self.deployment}.png"
        self.plot(REPORTS / plot)
        record_property("answers", written_down(self.answers))
        record_property("seconds from the load's begin to all replicas", self.reached)
        record_property("seconds from its end to one replica", round(self.back, 1))
        record_property("plot", f"reports/{plot}")
        assert self.reached is not None, f"it had {max(self.replicas)} replicas of {CEILING}"
        assert all(answer.good for answer in self.answers), written_down(self.answers)

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
        running = service.replicas(self.deployment)
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
        top.set(ylabel="replicas", ylim=(0, CEILING + 0.5), title=f"{self.deployment}: {CLIENTS} clients, then none")
        middle.plot(self.seconds, self.ongoing)
        middle.set(ylabel="requests in work")
        bottom.plot(self.seconds, self.queued)
        bottom.set(ylabel="seconds waited\nby those who wait", xlabel="seconds")
        for axes in (top, middle, bottom):
            axes.axvline(self.load_until, color="0.6", linestyle=":")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=120)
