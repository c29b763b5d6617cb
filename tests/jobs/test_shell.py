"""What every job wears: skip what is done, redo what changed, continue what was killed, link what came from what."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs import fit_units, tokenize_speech, train_encoder
from jobs.shell import Context, Job, JobError, _chosen, _fingerprint, _hash, command, execute
from speechgpt.recipe import Recipe, RecipeError, load
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace


class Work:
    """Counts to ten in a file, a line each; `stops_at` makes it fail on the way, as a killed job would leave it."""

    def __init__(self, output: str, stops_at: int = 11) -> None:
        self.output, self.stops_at, self.calls, self.counted = output, stops_at, 0, 0

    def __call__(self, context: Context) -> dict[str, Any]:
        self.calls += 1
        progress = "models/counting"
        start = len(context.workspace.read_bytes(progress)) if context.workspace.exists(progress) else 0
        for number in range(start, 10):
            if number == self.stops_at:
                raise JobError(f"stopped at {number}")
            context.workspace.write_bytes(progress, b"." * (number + 1))
            self.counted += 1
        context.workspace.write_bytes(self.output, str(context.recipe.seed).encode())
        context.workspace.delete(progress)
        return {"figures": {"counted": 10, "scores": {"wer": 0.25}, "note": "text"}, "outputs": [self.output]}


@pytest.fixture
def workspace(run_directory: Path) -> Workspace:
    return Workspace(run_directory)


@pytest.fixture
def recipe() -> Recipe:
    return load("tiny")


def reader(work: Work, **settings: Any) -> Job:
    return Job("instructions", "instructions", work, reads=("manifest",), **settings)


def writer(work: Work) -> Job:
    return Job("manifest", "manifest", work, sections=("data",), partial=("models/counting",))


def test_what_is_done_is_skipped(recipe: Recipe, workspace: Workspace) -> None:
    work = Work("manifest/utterances")
    first = execute(writer(work), recipe, workspace, json=True)
    second = execute(writer(work), recipe, workspace, json=True)
    assert (first["skipped"], second["skipped"], work.calls) == (False, True, 1)
    assert second["figures"] == first["figures"]
    assert second["outputs"] == {"manifest/utterances": workspace.digest("manifest/utterances")}


@pytest.mark.parametrize(
    ("override", "calls"), [("data.max_seconds=20", 2), ("seed=7", 2), ("vocoder.training.steps=9", 1)]
)
def test_only_what_the_result_depends_on_makes_it_run_again(
    recipe: Recipe, workspace: Workspace, override: str, calls: int
) -> None:
    work = Work("manifest/utterances")
    execute(writer(work), recipe, workspace, json=True)
    execute(writer(work), load("tiny", (override,)), workspace, json=True)
    assert work.calls == calls


def test_a_deleted_output_is_made_again(recipe: Recipe, workspace: Workspace) -> None:
    work = Work("manifest/utterances")
    execute(writer(work), recipe, workspace, json=True)
    workspace.delete("manifest/utterances")
    assert not execute(writer(work), recipe, workspace, json=True)["skipped"]
    assert workspace.exists("manifest/utterances")


def test_outputs_of_another_recipe_are_removed_first(recipe: Recipe, workspace: Workspace) -> None:
    execute(writer(Work("manifest/old")), recipe, workspace, json=True)
    execute(writer(Work("manifest/new")), load("tiny", ("seed=2",)), workspace, json=True)
    assert [name for name in workspace.list("manifest") if "_done" not in name] == ["manifest/new"]


def test_outputs_that_a_job_renews_itself_are_left_to_it(recipe: Recipe, workspace: Workspace) -> None:
    def work(context: Context) -> dict[str, Any]:
        names = ["manifest/rows", "quarantine/rows-1", "quarantine/other"]
        left = [name for name in names if context.workspace.exists(name)]
        for name in names:
            context.workspace.write_bytes(name, b"")
        return {"figures": {"left": left}, "outputs": names}

    job = Job("manifest", "manifest", work, sections=("data",), renews=("manifest/rows", "quarantine/rows-"))
    assert execute(job, recipe, workspace, json=True)["figures"]["left"] == []
    again = execute(job, load("tiny", ("seed=7",)), workspace, json=True)
    assert again["figures"]["left"] == ["manifest/rows", "quarantine/rows-1"]


def test_a_changed_input_makes_its_readers_run_again(recipe: Recipe, workspace: Workspace) -> None:
    read = Work("instructions/rows")
    with pytest.raises(JobError, match="instructions reads what manifest makes.*run it first"):
        execute(reader(read), recipe, workspace, json=True)
    for seed, calls in ((1, 1), (1, 1), (2, 2)):
        changed = load("tiny", (f"seed={seed}",))
        execute(writer(Work("manifest/utterances")), changed, workspace, json=True)
        execute(reader(read), recipe, workspace, json=True)
        assert read.calls == calls


def test_a_stopped_job_continues(recipe: Recipe, workspace: Workspace) -> None:
    with pytest.raises(JobError, match="stopped at 4"):
        execute(writer(Work("manifest/utterances", stops_at=4)), recipe, workspace, json=True)
    assert not workspace.exists("manifest/_done/manifest.json")
    rest = Work("manifest/utterances")
    execute(writer(rest), recipe, workspace, json=True)
    assert rest.counted == 6
    assert [name for name in workspace.list("manifest/_done") if "started" in name] == []


@pytest.mark.parametrize(("change", "left"), [("seed=2", 10), ("data.max_bad_fraction=0.06", 6)])
def test_a_stopped_job_starts_over_if_the_recipe_changed_by_more_than_a_limit(
    recipe: Recipe, workspace: Workspace, change: str, left: int
) -> None:
    with pytest.raises(JobError):
        execute(writer(Work("manifest/utterances", stops_at=4)), recipe, workspace, json=True)
    work = Work("manifest/utterances")
    execute(writer(work), load("tiny", (change,)), workspace, json=True)
    assert work.counted == left
    done = workspace.read_json("manifest/_done/manifest.json")["fingerprint"]
    assert (done == _of(writer(work), recipe)) == (left < 10)


def _of(job: Job, recipe: Recipe) -> str:
    sections = job.sections(recipe) if callable(job.sections) else job.sections
    return _fingerprint(recipe, sections, {}, (), ())


SECTIONS = ("data", "encoder", "voices", "engine")
"""What has limits."""


@pytest.mark.parametrize(
    "override",
    [
        "data.max_bad_fraction=0.06",
        "encoder.batch_seconds=20",
        "engine.max_failures=9",
        "voices.questions.tone={engine: http, service: {url: 'http://x/v1', retries: 9, timeout_seconds: 5}}",
    ],
)
def test_limits_do_not_count_for_any_job_and_all_else_does(override: str) -> None:
    asked = ("voices.questions.tone={engine: http, service: {url: 'http://x/v1'}}",)
    limited, plain = load("tiny", (*asked, override)), load("tiny", asked)
    assert limited != plain
    for job in (tokenize_speech.JOB, train_encoder.JOB, fit_units.JOB, Job("x", "x", Work("x"), sections=SECTIONS)):
        assert _of(job, limited) == _of(job, plain)
        assert _of(job, load("tiny", (*asked, override, "data.max_seconds=20"))) != _of(job, plain)


def test_fingerprints_of_workspaces_from_before_there_were_limits_hold(recipe: Recipe) -> None:
    whole = {"recipe": _chosen(recipe, SECTIONS), "inputs": {}, "files": {}}
    assert _fingerprint(recipe, SECTIONS, {}, (), ()) == _hash(whole)


@pytest.mark.parametrize("kind", ["files", "trees"])
def test_an_input_that_cannot_be_read_is_named_and_what_was_made_of_it_stays(
    recipe: Recipe, workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "corpus").mkdir()
    source = tmp_path / "corpus" / "rows.jsonl"
    source.write_text("a")
    named = source if kind == "files" else source.parent
    work = Work("manifest/utterances")
    job = Job("manifest", "manifest", work, partial=("models/counting",), **{kind: lambda recipe: [str(named)]})
    execute(job, recipe, workspace, json=True)
    workspace.write_bytes("models/counting", b"..")
    source.rename(tmp_path / "away")
    with pytest.raises(JobError, match=f"{named}.* (cannot be read|no such file)"):
        execute(job, recipe, workspace, json=True)
    assert workspace.missing(["manifest/utterances", "models/counting"]) == set()
    (tmp_path / "away").rename(source)
    assert execute(job, recipe, workspace, json=True)["skipped"]


def test_changing_back_does_not_trust_what_was_removed(recipe: Recipe, workspace: Workspace) -> None:
    execute(writer(Work("manifest/utterances")), recipe, workspace, json=True)
    with pytest.raises(JobError):
        execute(writer(Work("manifest/utterances", stops_at=4)), load("tiny", ("seed=2",)), workspace, json=True)
    back = Work("manifest/utterances")
    execute(writer(back), recipe, workspace, json=True)
    assert back.counted == 10
    assert workspace.read_bytes("manifest/utterances") == b"1"


_KILLED = """
import os, signal, sys
from jobs.shell import Job, execute
from speechgpt.recipe import load
from speechgpt.runtime.workspace import Workspace

def run(context):
    context.workspace.write_bytes("models/counting", b"....")
    os.kill(os.getpid(), signal.SIGKILL)

job = Job("manifest", "manifest", run, sections=("data",), partial=("models/counting",))
execute(job, load("tiny"), Workspace(sys.argv[1]), json=True)
"""


def test_kill_minus_nine_continues_and_its_run_is_closed(recipe: Recipe, workspace: Workspace) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, workspace.uri], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    rest = Work("manifest/utterances")
    marker = execute(writer(rest), recipe, workspace, json=True)
    assert rest.counted == 6
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    runs = MlflowClient(tracking.uri).search_runs([tracking.experiment_id])
    assert {run.info.run_id == marker["run_id"]: run.info.status for run in runs} == {False: "KILLED", True: "FINISHED"}


def test_the_run_tells_what_was_made_from_what(recipe: Recipe, workspace: Workspace) -> None:
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    with tracking.run("pipeline") as parent:
        made = execute(writer(Work("manifest/utterances")), recipe, workspace, parent_run=parent, json=True)
        read = execute(reader(Work("instructions/rows")), recipe, workspace, parent_run=parent, json=True)
    client = MlflowClient(tracking.uri)
    run = client.get_run(read["run_id"])
    assert run.data.tags["input.manifest"] == made["digest"]
    assert run.data.tags["input.manifest.run"] == made["run_id"]
    assert run.data.tags["output"] == read["digest"]
    assert run.data.tags["mlflow.parentRunId"] == parent.id
    assert run.data.metrics.keys() == {"seconds", "counted", "scores.wer"}
    assert [step.job for step in tracking.ancestry(read["run_id"])] == ["instructions", "manifest"]
    assert client.get_run(made["run_id"]).data.params["data.max_seconds"] == str(recipe.data.max_seconds)
    logged = client.download_artifacts(read["run_id"], "recipe.yaml")
    assert Path(logged).read_text() == recipe.yaml()
    assert workspace.read_bytes("instructions/_done/instructions.recipe.yaml").decode() == recipe.yaml()


def test_no_environment_variable_reaches_the_store(
    recipe: Recipe, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-aws")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the-secret-of-mlflow")
    execute(writer(Work("manifest/utterances")), recipe, workspace, json=True)
    kept = b"".join(Path(file).read_bytes() for file in Path(workspace.uri).rglob("*") if file.is_file())
    assert b"manifest/utterances" in kept
    assert b"the-secret-of" not in kept


def test_argument_names_section_input_and_marker(recipe: Recipe, workspace: Workspace) -> None:
    def inputs(recipe: Recipe, argument: str | None) -> tuple[str, ...]:
        before = recipe.stages[argument].start_from  # type: ignore[index]
        return (f"train-{before}",) if before else ()

    seen: list[str | None] = []

    def run(context: Context) -> dict[str, Any]:
        seen.append(context.argument)
        context.workspace.write_bytes(f"models/{context.argument}", b"weights")
        return {"figures": {}, "outputs": [f"models/{context.argument}"]}

    job = Job("train", "models", run, reads=inputs, sections=("stages.{argument}",), variants=("base", "adaptation"))
    for _ in range(2):
        for stage in ("base", "adaptation"):
            execute(job, recipe, workspace, stage, json=True)
    assert seen == ["base", "adaptation"]
    execute(job, load("tiny", ("stages.adaptation.steps=7",)), workspace, "base", json=True)
    assert seen == ["base", "adaptation"], "another stage's section is none of its business"
    assert workspace.exists("models/_done/train-adaptation.json")


def test_a_section_that_the_recipe_lacks_is_named(recipe: Recipe, workspace: Workspace) -> None:
    job = Job("train", "models", Work("models/x"), sections=("stages.{argument}",), variants=("none",))
    with pytest.raises(RecipeError, match=r"stages\.none"):
        execute(job, recipe, workspace, "none", json=True)


def _done(context: Context) -> dict[str, Any]:
    """Noise on every way out of a process that is not the result."""
    print("noise")
    os.write(1, b"noise of a library\n")
    subprocess.run(["echo", "noise of a child"], check=True)
    context.workspace.write_bytes("manifest/utterances", b"x")
    return {"figures": {"utterances": 3}, "outputs": ["manifest/utterances"]}


def _full(context: Context) -> dict[str, Any]:
    raise OSError(28, "No space left on device", "/data/units")


def _refuse(context: Context) -> dict[str, Any]:
    raise JobError("utterance 7: no text")


def _talk_and_refuse(context: Context) -> dict[str, Any]:
    """A worker goes on talking when the job is given up."""
    import ray

    # Within, for a worker has no such module.
    def talk() -> None:
        for number in range(10_000):
            print("worker's line", number, file=sys.stderr, flush=True)
            time.sleep(0.01)

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    talking = ray.remote(talk).remote()
    assert ray.wait([talking], timeout=5) == ([], [talking])
    raise JobError("utterance 7: no text")


def _break(context: Context) -> dict[str, Any]:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (_refuse, 1, "error: utterance 7: no text"),
        (_full, 1, "no space left on the disk (/data/units)"),
        (_break, 1, ""),
    ],
)
def test_failures_are_told_in_words_with_exit_code_1(
    run: Callable[[Context], dict[str, Any]],
    code: int,
    said: str,
    workspace: Workspace,
    capfd: pytest.CaptureFixture[str],
) -> None:
    app = command(Job("manifest", "manifest", run))
    result = CliRunner().invoke(app, ["--recipe", "tiny", "--workspace", workspace.uri, "--json"])
    assert result.exit_code == code
    assert said in capfd.readouterr().err + result.output
    assert not workspace.exists("manifest/_done/manifest.json")


@pytest.mark.parametrize(
    "words", [["--set", "data.nothing=1"], ["--recipe", "nowhere"], ["--set", "oops"], ["--no-such-option"], ["extra"]]
)
def test_wrong_usage_has_exit_code_2(words: list[str], workspace: Workspace) -> None:
    app = command(Job("manifest", "manifest", _done))
    usual = ["--recipe", "tiny", "--workspace", workspace.uri]
    assert CliRunner().invoke(app, usual + words).exit_code == 2


def test_a_variant_that_is_none_has_exit_code_2(workspace: Workspace) -> None:
    app = command(Job("train", "models", _done, variants=("base", "chain")))
    result = CliRunner().invoke(app, ["bass", "--recipe", "tiny", "--workspace", workspace.uri])
    assert result.exit_code == 2
    assert "base, chain" in result.output


def _as_process(run: Callable[[Context], dict[str, Any]], workspace: Workspace) -> subprocess.CompletedProcess[str]:
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('shell_test', {__file__!r})\n"
        "module = sys.modules['shell_test'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.command(module.Job('manifest', 'manifest', module.{run.__name__}))()\n"
    )
    words = ["--recipe", "tiny", "--workspace", workspace.uri, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment)


@pytest.mark.ray
def test_the_reason_comes_after_all_that_workers_said(workspace: Workspace) -> None:
    done = _as_process(_talk_and_refuse, workspace)
    assert done.returncode == 1
    assert "worker's line" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: utterance 7: no text"


def test_json_is_alone_on_standard_output(workspace: Workspace) -> None:
    done = _as_process(_done, workspace)
    assert done.returncode == 0
    assert json.loads(done.stdout)["figures"] == {"utterances": 3}
    assert done.stderr.count("noise") == 3
