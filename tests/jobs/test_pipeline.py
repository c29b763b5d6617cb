"""The walking skeleton: every job of the `tiny` recipe, through the command line, and once more."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import evaluate_instructions
from jobs.pipeline import measured
from jobs.shell import execute
from speechgpt.recipe import load
from speechgpt.runtime import bundle
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace

STEPS = [
    "manifest",
    "synthesize",
    "train-encoder",
    "fit-units",
    "tokenize",
    "instructions",
    "train-base",
    "train-adaptation",
    "train-crossmodal",
    "train-chain",
    "train-vocoder",
    "publish",
    "evaluate",
    "promote",
]
CONTRACT = {
    "recognition_wer",
    "answer_accuracy",
    "resynthesis_wer",
    "original_wer",
    "spoken_answer_wer",
    "format_validity",
    "utterances",
}


def whole(test: Callable[..., None]) -> Callable[..., None]:
    """For tests of the whole pipeline, which takes minutes once for all of them."""
    return pytest.mark.slow(pytest.mark.ray(pytest.mark.timeout(1800)(test)))


def speechgpt(*arguments: str) -> dict[str, Any]:
    """Run the command; its standard output must be one JSON object."""
    done = subprocess.run(
        [sys.executable, "-m", "speechgpt.cli", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Any]]:
    place = Workspace(tmp_path_factory.mktemp("pipeline") / "work")
    return place, speechgpt("pipeline", "--recipe", "tiny", "--workspace", place.uri)


@whole
def test_every_job_is_done_in_order_and_its_cost_known(made):
    _, result = made
    assert [step["title"] for step in result["steps"]] == STEPS
    assert not any(step["skipped"] for step in result["steps"])
    trained = next(step for step in result["steps"] if step["title"] == "train-base")
    assert trained["cpu_seconds"] > 1, "Ray's workers count, not only this process"


@whole
def test_what_was_made_is_evaluated_registered_and_promoted(made):
    place, result = made
    recipe = load("tiny")
    sealed = bundle.load(place.path("bundles/tiny"))
    tracking = Tracking.open(recipe.tracking, place, recipe.name)
    assert bundle.load(tracking.resolve("models:/speechgpt-tiny@champion")).digest == sealed.digest
    figures = place.read_json("reports/evaluation.json")
    assert set(figures) == CONTRACT | {"detail"}
    assert figures["utterances"] > 0 and figures["recognition_wer"] is not None
    assert list(figures["detail"]["stages"]) == ["untrained", "base", "adaptation", "crossmodal", "chain"]
    page = place.read_bytes("reports/evaluation.html").decode()
    assert page.startswith("<!doctype html>") and "<svg" in page, "with the loss curves that training logged"
    assert result["figures"]["bundle_digest"] == sealed.digest


@whole
def test_from_the_bundle_one_walks_back_to_the_data(made):
    place, _ = made
    recipe = load("tiny")
    tracking = Tracking.open(recipe.tracking, place, recipe.name)
    ancestors = {
        each.job for each in tracking.ancestry(tracking.run_of(bundle.load(place.path("bundles/tiny")).digest))
    }
    assert {
        "publish",
        "train-chain",
        "train-crossmodal",
        "instructions",
        "tokenize",
        "synthesize",
        "manifest",
    } <= ancestors


@whole
def test_again_nothing_is_done_twice(made):
    place, first = made
    began = time.monotonic()
    again = speechgpt("pipeline", "--recipe", "tiny", "--workspace", place.uri)
    assert all(step["skipped"] for step in again["steps"])
    assert [step["digest"] for step in again["steps"]] == [step["digest"] for step in first["steps"]]
    assert time.monotonic() - began < 60


@whole
def test_the_paper_s_evaluation_asks_the_bundle_and_every_stage(ray_cluster, made):
    place, _ = made
    # The model without the chain is the same one here: what counts is that both halves are asked.
    asked = f"standard: {place.path('bundles/tiny')}, questions: 3, tasks: 2, retention: 3"
    recipe = load("tiny", (f"instruction_following={{{asked}}}",))
    done = execute(evaluate_instructions.JOB, recipe, place)
    figures = place.read_json("reports/instruction_following.json")
    rows = place.read_table("reports/instruction_following.parquet").to_pylist()
    assert figures["rows"] == len(rows) == len({(row["system"], row["kind"], row["id"]) for row in rows})
    assert list(figures["retention"]) == ["untrained", "base", "adaptation", "crossmodal", "chain"]
    assert all(ways["standard"]["asked"] == ways["s2s"]["asked"] == 3 for ways in figures["ablation"].values())
    assert {row["speaker"] for row in rows} == {"low"}, "the voice that no training heard"
    assert done["figures"]["score"]["t2t"]["model"] is not None
    page = place.read_bytes("reports/instruction_following.html").decode()
    assert page.startswith("<!doctype html>") and "What stays in text" in page
    assert execute(evaluate_instructions.JOB, recipe, place)["skipped"]


@whole
def test_the_demo_serves_what_was_made_and_asks_it_aloud(made):
    place, _ = made
    shown = speechgpt("demo", "--recipe", "tiny", "--workspace", place.uri)
    assert all(step["skipped"] for step in shown["steps"])
    assert set(shown["figures"]) == CONTRACT
    assert shown["conversation"]["bundle"] == bundle.load(place.path("bundles/tiny")).digest
    assert shown["conversation"]["question"]
    assert Path(shown["files"]["question"]).stat().st_size > 1000


@whole
def test_the_bundle_is_evaluated_on_anybody_s_recordings(made, tmp_path):
    place, _ = made
    speech = place.read_table("speech").to_pylist()[:3]
    for row in speech:
        (tmp_path / f"{row['id']}.flac").write_bytes(row["audio"])
    rows = [{"id": row["id"], "path": f"{row['id']}.flac", "text": row["text"], "answer": "five"} for row in speech]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest, page = tmp_path / "m.jsonl", tmp_path / "reports" / "tiny.html"
    asked = ("--manifest", str(manifest), "--report", str(page))
    figures = speechgpt("evaluate", "--bundle", place.path("bundles/tiny"), *asked)
    assert set(figures) >= CONTRACT
    assert json.loads(page.with_suffix(".json").read_text()) == figures
    assert f"<title>{place.path('bundles/tiny')}" in page.read_text()
    assert figures["utterances"] == 3
    assert figures["answer_accuracy"] == 0.0


@whole
def test_a_bundle_alone_is_evaluated_on_what_its_recipe_kept_from_training(made, tmp_path):
    place, _ = made
    figures = speechgpt("evaluate", "--bundle", place.path("bundles/tiny"), "--workspace", str(tmp_path))
    own = place.read_json("reports/evaluation.json")
    assert {key: figures[key] for key in CONTRACT} == {key: own[key] for key in CONTRACT}


def test_cost_counts_child_processes_that_have_ended():
    with measured() as cost:
        subprocess.run([sys.executable, "-c", "x = sum(i * i for i in range(20_000_000))"], check=True)
    assert cost.cpu is not None and cost.cpu > 0.3
    assert cost.wall >= 0.3


def test_cost_is_unknown_on_a_cluster_of_others(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with measured() as cost:
        pass
    assert cost.cpu is None
