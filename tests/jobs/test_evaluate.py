"""What an evaluation is made of: which clips it hears, which models it asks, how its command is used."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs.evaluate import main
from jobs.shell import JobError
from jobs.subjects import stage_subjects
from jobs.utterances import manifest_utterances, workspace_utterances
from speechgpt.recipe import load
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.flac"
    path.write_bytes(audio.encode(0.3 * np.sin(np.arange(16000) * 0.2).astype(np.float32), "flac"))
    return path


def prompt(name: str, **changed: object) -> dict:
    row = {"id": name, "role": "question", "split": "heldout", "stranger": False, "speaker": "ann", "text": "hello"}
    return row | {"answer": "hello", "category": "repeat", "audio": b"sound"} | changed


def test_a_workspace_is_judged_on_what_training_never_heard(tmp_path, sound):
    place = Workspace(tmp_path / "work")
    rows = [
        prompt("seen"),
        prompt("stranger", stranger=True),
        prompt("trained", split="train"),
        prompt("answer", role="answer"),
    ]
    place.write_table("speech/part-a.parquet", pa.Table.from_pylist(rows))
    recorded = [
        {"id": "real", "path": str(sound), "text": "hello", "split": "heldout"},
        {"id": "wordless", "path": str(sound), "text": None, "split": "heldout"},
        {"id": "learned", "path": str(sound), "text": "hello", "split": "train"},
    ]
    place.write_table("manifest/utterances.parquet", pa.Table.from_pylist(recorded, UTTERANCE_SCHEMA))
    heard = {utterance.id: utterance.group for utterance in workspace_utterances(place)}
    assert heard == {"seen": "seen", "stranger": "stranger", "real": "recording"}


def test_a_manifest_is_judged_whole(tmp_path, sound):
    rows = [{"id": "a", "path": "sound.flac", "text": "hi", "answer": "hello", "category": "plus"}]
    rows += [{"id": "b", "path": "sound.flac", "split": "train"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = manifest_utterances(str(tmp_path / "m.jsonl"), limit=0)
    assert (first.id, first.text, first.answer, first.category) == ("a", "hi", "hello", "plus")
    assert (second.text, second.answer, second.sound) == (None, None, sound.read_bytes())


def test_a_bad_manifest_stops_with_its_rows(tmp_path, sound):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "path": "gone.flac"}')
    with pytest.raises(JobError, match=r"m.jsonl:1: missing_file"):
        manifest_utterances(str(tmp_path / "m.jsonl"), limit=0.5)


def test_a_lora_stage_is_its_adapter_on_the_model_it_started_from(tmp_path):
    place = Workspace(tmp_path)
    subjects = {subject.stage: subject for subject in stage_subjects(load("tiny"), place)}
    assert list(subjects) == ["base", "adaptation", "crossmodal", "chain"]
    assert (subjects["crossmodal"].model, subjects["crossmodal"].adapter) == ("models/crossmodal", None)
    assert (subjects["chain"].model, subjects["chain"].adapter) == ("models/crossmodal", "models/chain")


def test_the_untrained_model_stands_first_if_it_is_there(tmp_path):
    place = Workspace(tmp_path)
    place.write_bytes("checkpoints/base/start/config.json", b"{}")
    first = stage_subjects(load("tiny"), place)[0]
    assert (first.stage, first.model, first.adapter) == ("untrained", "checkpoints/base/start", None)


def test_a_manifest_needs_a_bundle():
    result = CliRunner().invoke(main, ["--manifest", "m.jsonl"])
    assert result.exit_code == 2
    assert "--manifest needs --bundle" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report", "page.html"], "--report needs --bundle"),
        (["--bundle", "nano", "--report", "page.json"], "should end in .html"),
    ],
)
def test_a_report_that_would_go_astray_is_refused(options, said):
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2
    assert said in result.output
