"""What every job wears: its verb, skipping finished work, resuming a killed attempt, lineage.

A job that has finished leaves a marker with a fingerprint of everything its result depends on: its recipe sections
(but for limits, `section.Mark`), the seed, and the outputs of the jobs it reads. Run again with the same fingerprint it
does nothing; with another it starts over, but for what it `renews`. A job that was killed left no marker; the next
attempt finds the same fingerprint in its `started` file and continues from what is there.
"""

import atexit
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from jobs import waiting
from speechgpt.recipe import Recipe, RecipeError, load
from speechgpt.runtime.files import StoreError, absolute, files_under, open_binary
from speechgpt.runtime.patience import patiently
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Run, Tracking
from speechgpt.runtime.workspace import Workspace
from speechgpt.section import content

PARTS = (
    *("manifest", "speech", "encoder", "units", "text2unit", "instructions"),
    *("models", "vocoder", "bundles", "reports"),
)
"""Directories of a workspace that hold markers."""


_OURS = ("speechgpt", "jobs", "serve")
"""Packages whose exceptions say in words what was wrong; of any other the traceback is shown."""

RecipeOption = Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")]
WorkspaceOption = Annotated[str, typer.Option(help="Directory or s3://bucket/prefix.", show_default="runs/RECIPE")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key of the recipe: section.key=value.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]


class JobError(RuntimeError):
    """A job that cannot do its work; the message says why and what to do."""


@dataclass(frozen=True)
class Context:
    """What a running job is handed."""

    recipe: Recipe
    workspace: Workspace
    progress: Progress
    run: Run
    argument: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    """{job that it reads from: digest of what that made}."""


@dataclass(frozen=True)
class Job:
    """A step of the pipeline.

    `{argument}` in `sections`, `reads` and `partial` stands for the command's argument.
    """

    name: str
    part: str
    """Directory of the workspace that the job's marker lies in."""
    run: Callable[[Context], dict[str, Any]]
    """Returns {"figures": {name: number}, "outputs": [workspace-relative name]}."""
    reads: tuple[str, ...] | Callable[[Recipe, str | None], tuple[str, ...]] = ()
    """Jobs whose outputs it reads: `tokenize`, or `train-base` for a job with an argument."""
    reads_if_there: tuple[str, ...] = ()
    """Jobs whose outputs it reads if they have finished: once they have, it is another job."""
    sections: tuple[str, ...] | Callable[[Recipe], tuple[str, ...]] = ()
    """Parts of the recipe that the result depends on, e.g. `encoder` or `stages.{argument}`; the seed always counts."""
    variants: tuple[str, ...] = ()
    """Values that the command's argument may take; without variants there is no argument."""
    files: Callable[[Recipe], Iterable[str]] = lambda recipe: ()
    """Files outside the workspace that the result depends on: another content under the same name is another job, and
    one that cannot be read is an error."""
    trees: Callable[[Recipe], Iterable[str]] = lambda recipe: ()
    """Directories and files outside the workspace that are too large to read for that: the names, sizes and dates of
    what is there count instead."""
    partial: tuple[str, ...] = ()
    """What a killed attempt may leave and the next one continues; deleted when the fingerprint has changed."""
    renews: tuple[str, ...] = ()
    """Beginnings of names of outputs that it brings up to date itself, since their own names say what they hold; all
    else that an earlier fingerprint made is deleted."""

    def title(self, argument: str | None = None) -> str:
        return f"{self.name}-{argument}" if argument else self.name


def execute(
    job: Job,
    recipe: Recipe,
    workspace: Workspace,
    argument: str | None = None,
    parent_run: Run | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Do the job unless it is done; returns its marker, with `skipped` beside it.

    Raises JobError if a job that it reads from has not finished or a file that it reads cannot be read, or whatever the
    job itself raises.
    """
    title = job.title(argument)
    progress = Progress(silent=json)
    marker = f"{job.part}/_done/{title}.json"
    inputs = {name: _finished(workspace, name, reader=title)["digest"] for name in _reads(job, recipe, argument)}
    inputs |= {name: found["digest"] for name in job.reads_if_there if (found := _marker(workspace, name))}
    sections = _filled(job.sections(recipe) if callable(job.sections) else job.sections, argument)
    fingerprint = _fingerprint(recipe, sections, inputs, job.files(recipe), job.trees(recipe))
    earlier = workspace.read_json(marker) if workspace.exists(marker) else None
    if earlier and earlier["fingerprint"] == fingerprint and not workspace.missing(earlier["outputs"]):
        progress.say(f"{title}: done already")
        return {**earlier, "skipped": True}

    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    started = _start(job, workspace, title, fingerprint, earlier, argument, tracking)
    tags = {"workspace": workspace.uri, "fingerprint": fingerprint}
    with tracking.run(title, parent_run, inputs, tags) as run:
        workspace.write_json(started, {"fingerprint": fingerprint, "run_id": run.id})
        run.log_text(recipe.yaml(), "recipe.yaml")
        run.log_params(_flat(_chosen(recipe, sections)))
        began = time.monotonic()
        progress.say(f"{title}: started")
        with waiting.watched(recipe, lambda text: progress.say(f"{title}: {text}")):
            result = job.run(Context(recipe, workspace, progress, run, argument, inputs))
        seconds = round(time.monotonic() - began, 2)
        outputs = {name: workspace.digest(name) for name in result["outputs"]}
        digest = _hash(outputs)
        run.made(digest, outputs)
        run.log_metrics({"seconds": seconds} | _numbers(result["figures"]))
        done = {
            "job": title,
            "fingerprint": fingerprint,
            "digest": digest,
            "outputs": outputs,
            "inputs": inputs,
            "figures": result["figures"],
            "run_id": run.id,
            "seconds": seconds,
        }
        workspace.write_bytes(f"{job.part}/_done/{title}.recipe.yaml", recipe.yaml().encode())
        workspace.write_json(marker, done)
    workspace.delete(started)
    progress.say(f"{title}: done in {seconds:.1f} s")
    return {**done, "skipped": False}


def command(job: Job) -> typer.Typer:
    """The job's verb; calling it runs the command line, so `main = command(JOB)` serves `python -m jobs.NAME`, too."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def plain(
        recipe: RecipeOption = "nano",
        workspace: WorkspaceOption = "",
        overrides: SetOption = None,
        json: JsonOption = False,
    ) -> None:
        perform(job, None, recipe, workspace, overrides, json)

    def varied(
        argument: Annotated[str, typer.Argument(metavar="STAGE", help=" | ".join(job.variants))],
        recipe: RecipeOption = "nano",
        workspace: WorkspaceOption = "",
        overrides: SetOption = None,
        json: JsonOption = False,
    ) -> None:
        if argument not in job.variants:
            raise typer.BadParameter(f"{argument!r} is not one of {', '.join(job.variants)}")
        perform(job, argument, recipe, workspace, overrides, json)

    app.command(job.name, help=sys.modules[job.run.__module__].__doc__)(varied if job.variants else plain)
    return app


def perform(
    job: Job, argument: str | None, recipe: str, workspace: str, overrides: list[str] | None, json: bool
) -> None:
    """Run a job as a command: result to standard output, errors in words; exit code 1 if it failed, 2 for usage."""
    with verb(json) as answer:
        resolved = load(recipe, tuple(overrides or ()))
        answer(execute(job, resolved, Workspace(workspace or f"runs/{resolved.name}"), argument, json=json))


@contextmanager
def verb(as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Around a verb's work: yields the function that prints its result; errors become messages and exit codes."""
    with _standard_output_kept(as_json) as output:
        joined = _is_joined()

        def answer(result: dict[str, Any]) -> None:
            print(
                json.dumps(result, ensure_ascii=False, default=str) if as_json else _summary(result),
                file=output,
                flush=True,
            )

        try:
            yield answer
        except RecipeError as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except Exception as error:
            if _is_joined() and not joined:
                # What Ray still relays of its workers would bury the reason.
                sys.modules["ray"].shutdown()
            # Ray wraps what a worker raised, and a wrapped OSError has lost its number.
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                where = cause.filename or cause
                _complain(f"no space left on the disk ({where}): make room and run again; what is done is safe")
            elif type(cause).__module__.partition(".")[0] in _OURS:
                _complain(str(cause))
            else:
                raise
            raise typer.Exit(1) from None


def _is_joined() -> bool:
    """Whether this process is in a Ray cluster; Ray, which is slow to import, is not imported for it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@contextmanager
def _standard_output_kept(only_result: bool) -> Iterator[Any]:
    """With `only_result` all else that this process and its children print goes to standard error (Ray relays what its
    workers print)."""
    if not only_result:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with open(kept, "w", closefd=False) as output, redirect_stdout(sys.stderr):
            yield output
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        atexit.register(_say_no_more)


def _say_no_more() -> None:
    """For the end of a process whose result is out: what Ray still relays of its workers goes to standard error.

    Functions registered later run earlier, so this comes before the one by which Ray ends.
    """
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = sys.stderr


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _start(
    job: Job, workspace: Workspace, title: str, fingerprint: str, earlier: Any, argument: str | None, tracking: Tracking
) -> str:
    """Make way for a new attempt: remove what another fingerprint made, keep what a killed attempt at this one left."""
    marker, started = f"{job.part}/_done/{title}.json", f"{job.part}/_done/{title}.started.json"
    attempt = workspace.read_json(started) if workspace.exists(started) else None
    if attempt:
        tracking.abandon(attempt["run_id"])
    if earlier:
        # The marker must not vouch for outputs that are half deleted, and must name them until they are gone.
        workspace.write_json(marker, {**earlier, "fingerprint": ""})
        for name in earlier["outputs"]:
            if not name.startswith(job.renews):
                workspace.delete(name)
        workspace.delete(marker)
    if fingerprint not in {past["fingerprint"] for past in (attempt, earlier) if past}:
        for name in _filled(job.partial, argument):
            workspace.delete(name)
    return started


def _reads(job: Job, recipe: Recipe, argument: str | None) -> tuple[str, ...]:
    return job.reads(recipe, argument) if callable(job.reads) else _filled(job.reads, argument)


def _finished(workspace: Workspace, title: str, reader: str) -> Any:
    """The marker of a job that another one reads from."""
    if found := _marker(workspace, title):
        return found
    raise JobError(f"{reader} reads what {title} makes, and {title} has not finished in {workspace.uri}: run it first")


def _marker(workspace: Workspace, title: str) -> Any | None:
    for part in PARTS:
        if workspace.exists(marker := f"{part}/_done/{title}.json"):
            return workspace.read_json(marker)
    return None


def _filled(names: tuple[str, ...], argument: str | None) -> tuple[str, ...]:
    return tuple(name.replace("{argument}", argument or "") for name in names)


def _chosen(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """{section: its values}; a section may be a dotted path. Raises RecipeError for one that the recipe lacks."""
    whole = recipe.model_dump(mode="json")
    chosen: dict[str, Any] = {"seed": recipe.seed}
    for section in sections:
        value: Any = whole
        for key in section.split("."):
            if not isinstance(value, dict) or key not in value:
                raise RecipeError(f"recipe {recipe.name}: no {section}, which this job needs")
            value = value[key]
        chosen[section] = value
    return chosen


def _fingerprint(
    recipe: Recipe, sections: tuple[str, ...], inputs: dict[str, str], files: Iterable[str], trees: Iterable[str]
) -> str:
    contents = {name: _content_digest(name) for name in files}
    contents |= {f"tree {name}": _tree_digest(name) for name in trees}
    return _hash({"recipe": _chosen(content(recipe), sections), "inputs": inputs, "files": contents})


def _content_digest(name: str) -> str:
    """sha256 of a file. Raises JobError for one that cannot be read: no other content, so what was made of it stays."""

    def digest() -> str:
        with open_binary(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    try:
        return patiently(digest, StoreError)
    except OSError as error:
        raise JobError(f"{name} cannot be read: {error}") from None


def _tree_digest(name: str) -> str:
    """Hash of what lies there, by names, sizes and dates. Raises JobError if nothing does, as `_content_digest`."""
    try:
        found = files_under(absolute(name))
    except OSError as error:
        raise JobError(f"{name} cannot be read: {error}") from None
    if not found:
        raise JobError(f"{name}: no such file or directory, or an empty one")
    return _hash(found)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that MLflow can plot."""
    return {name: float(value) for name, value in _flat(figures).items() if isinstance(value, int | float)}


def _summary(result: dict[str, Any]) -> str:
    figures = _flat(result["figures"])
    width = max(map(len, figures), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in figures.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
