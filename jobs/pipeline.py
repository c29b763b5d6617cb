"""Job `pipeline`: every job of a recipe, in the order the data flows, under one MLflow run.

Finished jobs are skipped, so a pipeline that was killed, or whose recipe changed late, does only what is left.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import typer

from jobs.shell import Job, JsonOption, RecipeOption, SetOption, WorkspaceOption, execute, verb
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace

_SAMPLING_SECONDS = 0.5
_COSTS = "reports/costs.json"
"""What each step cost when it was done, so that a later run can still say so."""


@dataclass(frozen=True)
class Step:
    """One job of the pipeline and what it cost, now or (skipped) when it was done.

    cpu_seconds is None on a cluster that this process did not start.
    """

    title: str
    skipped: bool
    wall_seconds: float
    cpu_seconds: float | None
    figures: dict[str, Any]
    digest: str


def steps(recipe: Recipe) -> list[tuple[Job, str | None]]:
    """(job, its argument) for each step, in order."""
    from jobs import (
        build_instructions,
        evaluate,
        fit_units,
        manifest,
        publish,
        synthesize,
        tokenize_speech,
        train_encoder,
        train_language,
        train_text_to_unit,
        train_vocoder,
    )

    writer = (train_text_to_unit,) if train_text_to_unit.is_needed(recipe) else ()
    before = (manifest, synthesize, train_encoder, fit_units, tokenize_speech, *writer, build_instructions)
    after = (train_vocoder.JOB, publish.JOB, evaluate.JOB, publish.PROMOTE)
    stages: list[tuple[Job, str | None]] = [(train_language.JOB, stage) for stage in recipe.stages]
    return [(module.JOB, None) for module in before] + stages + [(job, None) for job in after]


def run_pipeline(recipe: Recipe, workspace: Workspace, json: bool, report: Callable[[Step], None]) -> list[Step]:
    """Do every step that is not done; `report` is called after each. A step that fails ends it with its error.

    Raises JobError before the first if something that a later one needs is not there.
    """
    from jobs import preflight

    preflight.check(recipe)
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    earlier = workspace.read_json(_COSTS) if workspace.exists(_COSTS) else {}
    costs = {title: Cost(**cost) for title, cost in earlier.items()}
    finished = []
    with tracking.run("pipeline", tags={"workspace": workspace.uri}) as parent:
        parent.log_text(recipe.yaml(), "recipe.yaml")
        for job, argument in steps(recipe):
            title = job.title(argument)
            with measured() as cost:
                done = execute(job, recipe, workspace, argument, parent_run=parent, json=json)
            if done["skipped"]:
                cost = costs.get(title, Cost(wall=done["seconds"], cpu=None))
            costs[title] = cost
            workspace.write_json(_COSTS, {name: asdict(each) for name, each in costs.items()})
            step = Step(title, done["skipped"], cost.wall, cost.cpu, done["figures"], done["digest"])
            report(step)
            finished.append(step)
        fresh = [step for step in finished if not step.skipped]
        spent = {f"wall_seconds.{step.title}": step.wall_seconds for step in fresh}
        spent |= {f"cpu_seconds.{step.title}": step.cpu_seconds for step in fresh if step.cpu_seconds is not None}
        parent.log_metrics(spent)
    return finished


@dataclass
class Cost:
    """Seconds: by the clock, and of CPU over this process and its descendants (Ray's workers among them)."""

    wall: float = 0.0
    cpu: float | None = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Fill in what the block costs. A process that lives shorter than half a second may be missed."""
    cost, began, stop = Cost(), time.monotonic(), threading.Event()
    cpu = _ProcessTree()
    watcher = threading.Thread(target=cpu.watch, args=(stop,), daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        stop.set()
        watcher.join()
        cost.wall = round(time.monotonic() - began, 2)
        cost.cpu = None if os.environ.get("RAY_ADDRESS") else round(cpu.spent(), 2)


class _ProcessTree:
    """CPU time of this process and its descendants, remembering those that have ended."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._look()
        self._before = sum(self._seen.values())

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(_SAMPLING_SECONDS):
            self._look()

    def spent(self) -> float:
        self._look()
        return sum(self._seen.values()) - self._before

    def _look(self) -> None:
        import psutil

        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue


def show(finished: list[Step]) -> None:
    """The final table, on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "wall, s", "CPU, min", "", "result", title="pipeline")
    for step in finished:
        cpu = "–" if step.cpu_seconds is None else f"{step.cpu_seconds / 60:.2f}"
        table.add_row(
            step.title, f"{step.wall_seconds:.1f}", cpu, "before" if step.skipped else "", _brief(step.figures)
        )
    table.add_section()
    minutes = sum(step.cpu_seconds or 0 for step in finished) / 60
    table.add_row("together", f"{sum(step.wall_seconds for step in finished):.1f}", f"{minutes:.2f}", "", "")
    Console().print(table)


def _brief(figures: dict[str, Any]) -> str:
    numbers = [(name, value) for name, value in figures.items() if isinstance(value, int | float)]
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers[:4]
    )


def pipeline(
    recipe: RecipeOption = "nano", workspace: WorkspaceOption = "", set: SetOption = None, json: JsonOption = False
) -> None:
    with verb(json) as answer:
        resolved = load(recipe, tuple(set or ()))
        place = Workspace(workspace or f"runs/{resolved.name}")
        progress = Progress(silent=json)
        finished = run_pipeline(
            resolved, place, json, lambda step: progress.say(f"  {step.title}: {_brief(step.figures)}")
        )
        if json:
            total = {"workspace": place.uri, "steps": [asdict(step) for step in finished]}
            answer({"figures": finished[-1].figures, **total})
        else:
            show(finished)


main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
main.command("pipeline", help=__doc__)(pipeline)

if __name__ == "__main__":
    main()
