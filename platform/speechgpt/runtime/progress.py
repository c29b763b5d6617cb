"""What long work shows: a bar with rate and time left on a terminal, plain lines elsewhere, nothing under `--json`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """One piece of work of known or unknown length, counted in its own unit."""

    def __init__(self, progress: "Progress", description: str, total: float | None, unit: str, done: float) -> None:
        self.done = self._before = done
        self.total = total
        self._progress, self._description, self._unit = progress, description, unit
        self._began = self._shown = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.reach(self.done + amount)

    def reach(self, done: float) -> None:
        """Set how much is done so far."""
        self.done = done
        self._progress._moved(self)

    def begin(self, done: float) -> None:
        """Count the rate from here: what was done until now is an earlier attempt's, or took its time to get going."""
        self._before, self._began = done, time.monotonic()
        self.reach(done)

    def line(self) -> str:
        """`speaking: 120/400 clips, 14.2 clips/s, 20 s left`"""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._before) / seconds
        amount = f"{self.done:g}" if self.total is None else f"{self.done:g}/{self.total:g}"
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
        return f"{self._description}: {amount} {self._unit}, {rate:.3g} {self._unit}/s{left}"


class Progress:
    """Writes to standard error, so that standard output stays the result's."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self._console = Console(stderr=True, highlight=False)
        self._live: RichProgress | None = None
        self._bars: dict[Counter, TaskID] = {}

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.silent:
            self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def count(
        self, description: str, total: float | None = None, unit: str = "items", done: float = 0
    ) -> Iterator[Counter]:
        """Show a piece of work while the block runs; call `.advance(n)` or `.reach(n)` on what it gives.

        `done` is what an earlier attempt had finished: shown, but not counted into the rate.
        """
        counter = Counter(self, description, total, unit, done)
        if self.silent or not self._console.is_terminal:
            yield counter
            self.say(counter.line())
            return
        first = self._live is None
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            self._live = RichProgress(*columns, console=self._console)
            self._live.start()
        self._bars[counter] = self._live.add_task(description, total=total, completed=int(done), unit=unit)
        try:
            yield counter
        finally:
            del self._bars[counter]
            if first:
                self._live.stop()
                self._live = None

    def _moved(self, counter: Counter) -> None:
        if self._live is not None and counter in self._bars:
            self._live.update(self._bars[counter], completed=counter.done)
        elif not self.silent and time.monotonic() - counter._shown > _SECONDS_BETWEEN_LINES:
            counter._shown = time.monotonic()
            self.say(counter.line())


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "items")
        return Text("" if speed is None else f"{speed:.3g} {unit}/s", style="progress.data.speed")
