"""Prompts are spoken by the voices that they name, and no others are asked for."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs import synthesize
from jobs.manifest import prompts_of
from jobs.shell import Job, execute
from jobs.synthesize import speak
from speechgpt import recipe
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech.voices import VoiceError


@pytest.mark.ray
def test_voices_that_say_nothing_need_not_be_there(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "voices.questions.absent={engine: kokoro, voice: am_nobody, examined: false}"
    chosen = recipe.load("tiny", (absent, "data.max_bad_fraction=0"))
    prompts, workspace = prompts_of(chosen), Workspace(tmp_path / "work")
    of_training = set(prompts["voice"].to_pylist())
    asked = prompts.filter([split == "heldout" for split in prompts["split"].to_pylist()])
    assert "absent" in of_training and "absent" not in asked["voice"].to_pylist()
    assert speak(asked, chosen, workspace, Progress(silent=True)) == 0
    spoken = workspace.read_table("speech")
    assert sorted(spoken["id"].to_pylist()) == sorted(asked["id"].to_pylist())
    with pytest.raises(Exception, match="kokoro|am_nobody") as refused:
        speak(prompts, chosen, Workspace(tmp_path / "all"), Progress(silent=True))
    assert VoiceError.__name__ in str(refused.value)


@pytest.fixture
def workspace(run_directory: Path) -> Workspace:
    return Workspace(run_directory)


def test_a_file_is_named_by_what_its_sound_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "_SHARD", 20)

    def names(*overrides: str, columns: tuple[str, ...] = ()) -> list[str]:
        chosen = recipe.load("tiny", overrides)
        prompts = prompts_of(recipe.load("tiny"))
        for name in columns:
            changed = pa.array([f"{value} indeed" for value in prompts[name].to_pylist()])
            prompts = prompts.set_column(prompts.schema.get_field_index(name), name, changed)
        return [shard["file"] for shard in synthesize._plan(prompts, chosen)]

    before = names()
    assert before == names("evaluation.questions=3", "data.max_bad_fraction=1") and len(set(before)) == len(before) > 1
    assert {name.rpartition("-")[0] for name in before} == {
        name.rpartition("-")[0] for name in names(columns=("text",))
    }, "in the order in which they were"
    assert not set(before) & set(names(columns=("text",)))
    for setting in ("seed=7", "voices.recorded=0.7"):
        assert not set(before) & set(names(setting))
    (voice, *_) = recipe.load("tiny").voices.questions
    assert set(before) != set(names(f"voices.questions.{voice}.pitch=[3, 4]"))
    assert before == names(f"voices.questions.{voice}.share=2")


@pytest.mark.ray
def test_prompts_that_were_spoken_are_not_spoken_again(ray_cluster: None, workspace: Workspace) -> None:
    """Nor where the manifest is another; files of prompts that are gone go, those with silent ones are tried again."""
    chosen = recipe.load("tiny")
    known = prompts_of(chosen).to_pylist()
    prompts = pa.Table.from_pylist([known[n % len(known)] | {"id": f"{n:04d}"} for n in range(510)])

    def spoken(wanted: pa.Table) -> dict[str, int]:
        """{file: when it was written}"""
        workspace.write_table("manifest/prompts.parquet", wanted)
        made = Job("manifest", "manifest", lambda context: {"figures": {}, "outputs": ["manifest/prompts.parquet"]})
        workspace.delete("manifest/_done")
        execute(made, chosen, workspace, json=True)
        execute(synthesize.JOB, chosen, workspace, json=True)
        parts = [name for name in workspace.list("speech") if "/part-" in name]
        return {name: Path(workspace.path(name)).stat().st_mtime_ns for name in parts}

    before = spoken(prompts.slice(0, 500))
    after = spoken(prompts.slice(0, 510))
    assert len(before) == 2 and len(after) == 3 and before.items() < after.items()
    assert sorted(workspace.read_table("speech")["id"].to_pylist()) == prompts.slice(0, 510)["id"].to_pylist()
    silent = pa.Table.from_pylist([{"source": "x", "reason": "unspoken", "detail": "the service was away"}])
    for file in before:
        workspace.write_table(file.replace("speech", "quarantine/synthesize"), silent)
    again = spoken(prompts.slice(0, 250))
    assert len(again) == 1 and not again.items() & before.items() and not workspace.list("quarantine")
