"""Send a job, or the whole pipeline, to a running Ray cluster, and look after it there.

The code travels with the job as a zip file in `working_dir`, which Ray unpacks on every node and puts first on the
path of the driver and of all workers. A wheel in `py_modules` would not do: Ray installs it with pip and all its
dependencies on each node, and takes two builds of one version for the same. No environment variable and no credential
travels: jobs, their environment and their metadata can be read by everyone who can reach the dashboard, so storage
and tracking keys come from the nodes (instance role, Kubernetes secret).
"""

import hashlib
import importlib
import json as json_module
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import speechgpt
from jobs import job_client
from jobs.job_client import ADDRESS_VARIABLE, ClusterError
from jobs.shell import Job, JsonOption, SetOption
from jobs.waiting import latest
from speechgpt.recipe import Recipe, RecipeError, load, shipped
from speechgpt.runtime.code_archive import write_code_archive

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DISTRIBUTION = "speechgpt-ray"
PACKAGES = ("speechgpt", "jobs", "serve")
RECIPE_FILE = "recipe.yaml"

Address = Annotated[
    str, typer.Option(envvar=ADDRESS_VARIABLE, help="The cluster's dashboard, e.g. http://head:8265.", show_envvar=True)
]
SubmissionId = Annotated[str, typer.Argument(help="The id that `submit` printed.")]
LOCAL = "http://127.0.0.1:8265"


@dataclass(frozen=True)
class Work:
    """What is asked of a cluster."""

    job: str
    argument: str | None
    source: str
    """The recipe as the user named it: a shipped one's name, or a file."""
    overrides: tuple[str, ...]
    recipe: Recipe
    workspace: str

    def name(self) -> str:
        """A submission id that the same work always gets, so that sending it twice does not run it twice."""
        parts = [self.job, self.argument or "", self.workspace, self.recipe.yaml()]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return "-".join(part for part in (self.recipe.name, self.job, self.argument, digest[:10]) if part)

    def travels(self) -> dict[str, bytes]:
        """Files beside the code: a recipe that is not shipped, resolved, because the files it extends stay behind."""
        return {} if self.source in shipped() else {RECIPE_FILE: self.recipe.yaml().encode()}

    def command(self) -> list[str]:
        recipe = ["--recipe", RECIPE_FILE]
        if not self.travels():
            recipe = ["--recipe", self.source, *(word for override in self.overrides for word in ("--set", override))]
        argument = [self.argument] if self.argument else []
        return ["python", "-m", "speechgpt.cli", self.job, *argument, *recipe, "--workspace", self.workspace]

    def description(self) -> dict[str, str]:
        """The metadata by which people find the job again."""
        return {
            "job": " ".join(filter(None, (self.job, self.argument))),
            "recipe": self.recipe.name,
            "recipe_sha256": hashlib.sha256(self.recipe.yaml().encode()).hexdigest(),
            "workspace": self.workspace,
            "version": speechgpt.__version__,
        }


def main(
    job: Annotated[str, typer.Argument(help="A job's verb, e.g. tokenize, train, pipeline.")],
    argument: Annotated[str | None, typer.Argument(help="The job's own argument, e.g. the stage of `train`.")] = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe, or a YAML file, which travels with the job.")] = "nano",
    workspace: Annotated[str, typer.Option(help="s3://bucket/prefix, or a directory that all nodes share.")] = "",
    overrides: SetOption = None,
    address: Address = LOCAL,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the cluster has the job.")] = False,
    submission_id: Annotated[str, typer.Option(help="Name the job instead of deriving its id from its content.")] = "",
    retries: Annotated[
        int, typer.Option(min=0, help="How often a job that failed is sent again, to go on from its workspace.")
    ] = 0,
    again: Annotated[bool, typer.Option("--again", help="Run once more what has already succeeded.")] = False,
    json: JsonOption = False,
) -> None:
    """Submit a job to a Ray cluster, follow its log, and end as it ends."""
    if retries and detach:
        _usage("--retries needs somebody who sees the job fail: leave out --detach")
    work = _work(job, argument, recipe, tuple(overrides or ()), workspace)
    name = submission_id or work.name()
    with _reported():
        client = job_client.connect(address)
        known = job_client.attempts(client, name)
        last = known[-1] if known else None
        if last is None or last.status in ("FAILED", "STOPPED") or (last.status == "SUCCEEDED" and again):
            running = job_client.attempt_id(name, len(known) + 1)
            _say(f"submitting {running} to {client.get_address()}")
            _submit(client, running, work)
        else:
            running = str(last.submission_id)
            if last.status == "SUCCEEDED":
                _say(f"{running} has already succeeded; --again runs it once more")
                detach = True
            else:
                _say(f"{running} is already {last.status.lower()}: attaching to it")
        while not detach and _follow(client, running, json) == "FAILED" and retries:
            retries -= 1
            running = job_client.attempt_id(name, len(job_client.attempts(client, name)) + 1)
            _say(f"failed; submitting {running}, which goes on from the workspace")
            _submit(client, running, work)
        _end(client, running, json, message=detach)


def status(submission_id: SubmissionId, address: Address = LOCAL, json: JsonOption = False) -> None:
    """Say how a submitted job is doing, and which nodes it waits for that the cluster cannot give."""
    with _reported():
        client = job_client.connect(address)
        details = job_client.details(client, submission_id)
        wait = ""
        if details.status == "RUNNING":
            wait = latest(job_client.call(client, "read the log", lambda: client.get_job_logs(submission_id)))
        _print_state(details, json, waits_for=wait)


def logs(
    submission_id: SubmissionId,
    address: Address = LOCAL,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until the job ends, and end as it ends.")
    ] = False,
) -> None:
    """Print a submitted job's log."""
    with _reported():
        client = job_client.connect(address)
        job_client.details(client, submission_id)
        if follow:
            _follow(client, submission_id, json=False)
            _end(client, submission_id, json=False, message=False)
        else:
            text = job_client.call(client, "read the log", lambda: client.get_job_logs(submission_id))
            sys.stdout.write(text)


def stop(submission_id: SubmissionId, address: Address = LOCAL, json: JsonOption = False) -> None:
    """Stop a submitted job; submitting it again resumes it."""
    with _reported():
        client = job_client.connect(address)
        job_client.details(client, submission_id)
        job_client.call(client, "stop the job", lambda: client.stop_job(submission_id))
        job_client.follow(client, submission_id, emit=lambda _: None, notice=_say)
        _print_state(job_client.details(client, submission_id), json)


def list_jobs(address: Address = LOCAL, json: JsonOption = False) -> None:
    """List the jobs that a cluster was sent, newest first."""
    with _reported():
        client = job_client.connect(address)
        jobs = job_client.call(client, "list jobs", client.list_jobs)
    submitted = sorted((j for j in jobs if j.submission_id), key=lambda j: j.start_time or 0, reverse=True)
    if json:
        typer.echo(json_module.dumps({"jobs": [_state(j) for j in submitted]}))
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("submission_id", "status", "started", "seconds", "workspace")
    table = Table(*columns, box=None)
    for state in map(_state, submitted):
        table.add_row(*(str(state[column] or "") for column in columns))
    Console().print(table)


def _work(job: str, argument: str | None, source: str, overrides: tuple[str, ...], workspace: str) -> Work:
    """What the command line asks for; whatever is wrong with it is said before anything is sent."""
    argument_of(job, argument)
    if not workspace:
        _usage("--workspace is missing: s3://bucket/prefix, or a directory that all nodes share")
    place = workspace if "://" in workspace else str(Path(workspace).expanduser().resolve())
    try:
        recipe = load(source, overrides)
    except RecipeError as error:
        _usage(str(error))
    for where, text in (("--workspace", place), ("the recipe", recipe.yaml())):
        if re.search(r"://[^/\s:@]+:[^/\s@]+@", text):
            _usage(
                f"{where} holds a password in an address; everyone who can reach the dashboard could read it. "
                "Give it to the nodes instead (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, AWS_…)"
            )
    return Work(job, argument, source, overrides, recipe, place)


def argument_of(job: str, argument: str | None = None) -> str | None:
    """`argument`, if `job` is one that takes it; else a message and exit code 2."""
    variants = _variants(job)
    if (argument or "") not in (variants or ("",)):
        _usage(f"{job} takes {'one of ' + ', '.join(variants) if variants else 'no argument'}, not {argument!r}")
    return argument


def _variants(verb: str) -> tuple[str, ...]:
    """The values that a job's argument takes. Jobs of other distributions count, verbs that are not jobs do not."""
    if verb == "pipeline":
        return ()
    for entry in metadata.entry_points(group="speechgpt.commands", name=verb):
        for member in vars(importlib.import_module(entry.module)).values():
            if isinstance(member, Job) and member.name == verb:
                return member.variants
    _usage(f"{verb!r} is not a job that can be submitted; `speechgpt --help` lists the jobs")


def _submit(client: "JobSubmissionClient", submission_id: str, work: Work) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "code.zip"
        write_code_archive(archive, PACKAGES, DISTRIBUTION, work.travels())
        code = hashlib.sha256(archive.read_bytes()).hexdigest()
        request = {
            "entrypoint": shlex.join(work.command()),
            "runtime_env": {"working_dir": str(archive)},
            "metadata": work.description() | {"code_sha256": code},
        }
        job_client.submit(client, submission_id, request)


def _end(client: "JobSubmissionClient", submission_id: str, json: bool, message: bool) -> None:
    """Print the state, and exit 1 if the job failed or was stopped.

    Of a failure Ray's message repeats the end of the log: it is for who has not just seen that.
    """
    details = job_client.details(client, submission_id)
    _print_state(details, json, message)
    if details.status in ("FAILED", "STOPPED"):
        raise typer.Exit(1)


def _follow(client: "JobSubmissionClient", submission_id: str, json: bool) -> str:
    """Print the log as it comes; the job's final status."""
    out = sys.stderr if json else sys.stdout

    def emit(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        return str(job_client.follow(client, submission_id, emit, notice=_say))
    except KeyboardInterrupt:
        _say(f"the job goes on: speechgpt logs {submission_id} --follow, speechgpt stop {submission_id}")
        raise typer.Exit(130) from None


def _state(details: "JobDetails") -> dict[str, Any]:
    """What people and scripts are told of a job; times are local, durations seconds."""
    sent = details.metadata or {}
    started = seconds = None
    if details.start_time:
        started = datetime.fromtimestamp(details.start_time / 1000)
        ended = datetime.fromtimestamp(details.end_time / 1000) if details.end_time else datetime.now()
        seconds = round((ended - started).total_seconds(), 1)
    return {
        "submission_id": details.submission_id,
        "status": str(details.status),
        "message": details.message or "",
        "job": sent.get("job"),
        "recipe": sent.get("recipe"),
        "workspace": sent.get("workspace"),
        "started": started and started.isoformat(" ", "seconds"),
        "seconds": seconds,
    }


def _print_state(details: "JobDetails", json: bool, message: bool = True, waits_for: str = "") -> None:
    state = _state(details) | ({"waits_for": waits_for} if waits_for else {})
    if json:
        typer.echo(json_module.dumps(state))
    else:
        said = f": {state['message']}" if message and state["message"] else ""
        wait = f"; waits for nodes: {waits_for}" if waits_for else ""
        typer.echo(f"{state['submission_id']} {state['status'].lower()}{said}{wait}")


def _say(message: str) -> None:
    typer.echo(message, err=True)


@contextmanager
def _reported() -> Iterator[None]:
    """Around what speaks to a cluster: its errors as messages and exit code 1."""
    try:
        yield
    except ClusterError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _usage(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
