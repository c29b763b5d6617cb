"""Figures of a running Ray Train job as they come: curves in MLflow, a bar with rate and time left."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.queue import Empty, Queue

from jobs.shell import Context


class TrainingCurves:
    """Takes figures from a worker straight to the driver, which owns the tracking run and the terminal.

    `ray.train.report` waits for every worker and for the controller's next look; between checkpoints nothing need wait.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def send(self, figures: dict[str, Any]) -> None:
        """figures must have the key `step`."""
        self._queue.put(figures)


@contextmanager
def training_curves(context: Context, title: str, steps: int) -> Iterator[TrainingCurves]:
    """Show and log what is reported while the block runs."""
    queue = Queue(actor_options={"num_cpus": 0})
    ended = threading.Event()

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
                context.run.log_metrics({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=step)

    follower = threading.Thread(target=follow, name="training-curves")
    follower.start()
    try:
        yield TrainingCurves(queue)
    finally:
        ended.set()
        follower.join()
        queue.shutdown()
