"""The paper's evaluation as a job: who is asked, what is kept when it is interrupted, what it leaves."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from told_service import Answer, chat
from typer.testing import CliRunner

from jobs.evaluate_instructions import JOB, main, of_bundle, of_voices
from jobs.instruction_interviews import standard_bundle
from jobs.interviews import Parts, verdicts
from jobs.shell import JobError, execute
from jobs.subjects import Served
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.evaluation.judge import Item, JudgeError, Verdict
from speechgpt.recipe import RecipeError, load
from speechgpt.runtime import bundle
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.recordings import read_bytes, read_manifests
from speechgpt.runtime.workspace import Workspace

KEY = "sk-a-secret"
SILENT = Progress(silent=True)


class Counting:
    """A judge that gives everything a three, and fails once it has judged so many."""

    name = "three"

    def __init__(self, until: int = 1000) -> None:
        self.until, self.judged = until, []

    def seen(self, item):
        return item

    def score(self, items):
        if len(self.judged) >= self.until:
            raise JudgeError("gone")
        self.judged += items
        return [Verdict(3)] * len(items)


def test_held_out_voices_are_asked_where_there_are_any():
    asked = InstructionFollowingSection()
    assert of_voices([1, -1, 2], asked, lambda number: number < 0) == [-1]
    assert of_voices([1, 2], asked, lambda number: number < 0) == [1, 2]
    assert of_voices([1, -1], asked.model_copy(update={"voices": "heard"}), lambda number: number < 0) == [1]
    assert of_voices([1, -1], asked.model_copy(update={"voices": "all"}), lambda number: number < 0) == [1, -1]


def test_what_was_judged_is_not_judged_again(tmp_path):
    parts = Parts(Workspace(tmp_path), "parts")
    items = [Item("q", f"reply {number // 2}", None, True) for number in range(140)]
    with pytest.raises(JudgeError, match="gone"):
        verdicts(items, Counting(until=32), parts, SILENT)
    again = Counting()
    found = verdicts(items, again, parts, SILENT)
    assert len(again.judged) == 70 - 32, "each different answer once, and none of those before the failure"
    assert found == {item: Verdict(3) for item in items}


def test_a_manifest_needs_a_bundle():
    result = CliRunner().invoke(main, ["--manifest", "m.jsonl"])
    assert result.exit_code == 2 and "--manifest needs --bundle" in result.output


def test_a_bundle_is_asked_under_its_own_recipe_and_what_is_set(tmp_path):
    _, chosen, place = of_bundle("nano", "", "tiny", str(tmp_path), ("instruction_following.questions=7",))
    assert (chosen.name, chosen.instruction_following.questions) == ("nano-full", 7)
    _, _, other = of_bundle("nano", "", "tiny", str(tmp_path), ())
    assert place.uri == other.uri, "settings change the job, not its place"
    with pytest.raises(RecipeError, match=r"recipe of bundle nano: instruction_following\.question: unknown key"):
        of_bundle("nano", "", "tiny", str(tmp_path), ("instruction_following.question=7",))


def test_an_unpublished_workspace_is_told_what_is_missing(run_directory):
    result = CliRunner().invoke(main, ["--recipe", "tiny", "--workspace", str(run_directory)])
    assert result.exit_code == 1
    assert "evaluate-instructions reads what manifest makes" in result.output


class Judge:
    """A chat route that is out of order until it works; then it gives fours, and nothing readable to `bad`."""

    works, bad = False, ""

    def __call__(self, body: dict[str, Any]) -> Answer:
        if not self.works:
            return 500, {}, b"oh"
        return chat("no digit" if self.bad and said_in(body)["reply"] == self.bad else "4")


def said_in(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(body["messages"][1]["content"])


def questions(folder: Path, count: int) -> str:
    """A manifest of shipped recordings, each with an answer that it never gets."""
    rows = []
    for row in read_manifests(["package:recordings/manifest.jsonl"]).rows[:count]:
        (folder / f"{row['id']}.opus").write_bytes(read_bytes(row["path"]))
        rows.append({"id": row["id"], "path": f"{row['id']}.opus", "text": row["text"], "answer": "it is five"})
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "m.jsonl")


@pytest.mark.ray
@pytest.mark.slow
def test_a_bundle_alone_is_asked_everything_and_an_interrupted_run_goes_on(
    ray_cluster, tmp_path, serve, monkeypatch, capfd
):
    monkeypatch.setenv("A_JUDGE_KEY", KEY)
    judge = Judge()
    service = serve(judge)
    settings = (
        f"instruction_following.judge={{url: '{service.url}', model: a-judge, key_variable: A_JUDGE_KEY, retries: 0}}",
        "instruction_following.tasks=2",
        "evaluation.bootstrap=20",
        "evaluation.recogniser=none",
        "generation.max_new_tokens=60",
    )
    job, recipe, place = of_bundle("nano", questions(tmp_path, 3), "tiny", str(tmp_path), settings)
    with pytest.raises(JudgeError, match="instruction_following.judge: .*: no rating after 1 attempts: 500"):
        execute(job, recipe, place)
    kept = "reports/instruction_following.parts/model.s2t.json"
    answers = place.read_json(kept)
    [first, second, _] = answers
    answers[first][1], answers[second][1] = "kept from before", "not to be judged"
    place.write_json(kept, answers)

    judge.works, judge.bad = True, "not to be judged"
    done = execute(job, recipe, place)
    figures = place.read_json("reports/instruction_following.json")
    rows = place.read_table("reports/instruction_following.parquet").to_pylist()
    assert "kept from before" in {row["text"] for row in rows}, "what was answered is not asked again"
    assert not place.exists("reports/instruction_following.parts")
    keys = Counter((row["system"], row["kind"], row["id"]) for row in rows)
    # Four forms, two ways without the whole chain, three of the cascade; the recogniser's own cascade cannot be.
    assert len(keys) == (4 + 2 + 3) * 3 == figures["rows"] and set(keys.values()) == {1}
    for form, systems in figures["forms"].items():
        for counted in systems.values():
            assert counted["asked"] == 3
            assert counted["scored"] + sum(counted[why] for why in ("unreadable", "unknown", "unheard")) == 3
            assert (counted["unheard"] == 3) == (form in ("s2s", "t2s")), "nobody listens"
    assert figures["forms"]["s2t"]["model"]["unreadable"] == 1
    assert figures["judge"] == "a-judge" and figures["recogniser"] is None
    assert list(figures["retention"]) == ["bundle"] and figures["retention"]["bundle"]["t2t"]["asked"] == 3
    assert all(task["asked"] == 2 for task in figures["task_recognition"]["tasks"].values())
    assert figures["ablation"]["standard"] == {"s2s": None, "direct": None, "standard": None}
    assert len(figures["notes"]) == 3
    judged = [said_in(body) for body in service.asked]
    asked = Counter(map(json.dumps, judged))
    assert all(said["right_answer"] == "it is five" for said in judged)
    assert max(asked.values()) <= 2, "each different answer once, and the failed attempts"
    assert done["figures"]["questions"] == 3
    written = [place.read_bytes(name) for name in place.list("") if not name.endswith((".db", ".parquet"))]
    assert not any(KEY.encode() in content for content in written)
    assert KEY not in "".join(capfd.readouterr())
    assert execute(job, recipe, place)["skipped"]


def test_the_other_half_of_the_ablation_must_have_the_same_units(tmp_path):
    nano = bundle.load("nano")
    section = InstructionFollowingSection(standard="nano")
    assert standard_bundle(section, Served("nano")).address == "nano"
    parts = {name: part for name in bundle.REQUIRED if (part := nano.part(name))}
    shutil.copytree(parts["encoder"], tmp_path / "encoder")
    (tmp_path / "encoder" / "unit_config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    bundle.write(tmp_path / "other", {**parts, "encoder": tmp_path / "encoder"}, {}, {})
    with pytest.raises(JobError, match=r"instruction_following\.standard: nano has another encoder than .*other"):
        standard_bundle(section, Served(str(tmp_path / "other")))


def test_another_bundle_to_compare_with_is_another_job():
    """Whichever way it is named: its index counts."""
    [index] = JOB.files(load("tiny", ("instruction_following.standard=nano",)))
    assert json.loads(Path(index).read_text())["digest"] == bundle.load("nano").digest
    assert JOB.files(load("tiny")) == []


def test_the_job_reads_the_published_bundle_and_depends_on_its_sections():
    assert JOB.title() == "evaluate-instructions"
    assert "publish" in JOB.reads and "instruction_following" in JOB.sections
