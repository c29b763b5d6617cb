"""Figures of a running Ray Train job as they come: curves in MLflow, a bar with rate and time left."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.shell import Context

logger = logging.getLogger(__name__)

Listen = Callable[[int, list[dict[str, Any]]], None]
"""Takes a step and what the model answered at it."""


class TrainingCurves:
    """Takes figures from a worker straight to the driver, which owns the tracking run and the terminal.

    `ray.train.report` waits for every worker and for the controller's next look; between checkpoints nothing need wait.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def send(self, figures: dict[str, Any]) -> None:
        """figures must have the key `step`; a list under `answers` goes to the listener."""
        self._queue.put(figures)


@contextmanager
def training_curves(context: Context, title: str, steps: int, listen: Listen | None = None) -> Iterator[TrainingCurves]:
    """Show and log what is reported while the block runs, and what this machine is doing."""
    # Where this driver is: on a node that goes before it does, each attempt of the training would fail anew.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    ended = threading.Event()

    def show(step: int, figures: dict[str, Any]) -> None:
        numbers = {k: v for k, v in figures.items() if isinstance(v, int | float) and k != "step"}
        if numbers:
            context.run.log_metrics(numbers, step=step)
        if listen is not None and figures.get("answers"):
            listen(step, figures["answers"])

    def follow() -> None:
        with context.progress.count(title, steps, "steps") as counter:
            begun = False
            while not (ended.is_set() and queue.empty()):
                try:
                    figures = queue.get(timeout=0.5)
                except Empty:
                    continue
                step = int(figures["step"])
                (counter.reach if begun else counter.begin)(step)
                begun = True
                try:
                    show(step, figures)
                except Exception:
                    # A thread that ended here would take all later figures with it.
                    logger.exception("what was reported at step %d is not in MLflow, or not all of it", step)

    follower = threading.Thread(target=follow, name="training-curves")
    follower.start()
    try:
        with context.run.system_metrics():
            yield TrainingCurves(queue)
    finally:
        ended.set()
        follower.join()
        queue.shutdown()
