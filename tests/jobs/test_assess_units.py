"""What is said of the units: of synthesised questions, and of a corpus of recordings alone."""

from pathlib import Path

import pyarrow as pa
import pytest
import sound_files
from tiny_models import add_encoder

from jobs import assess_units
from jobs.assess_units import _assess, _recordings
from jobs.shell import Context, JobError
from speechgpt.recipe import load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace

NOTHING_ASKED = "world={file: empty, readings: 0}"


def recorded(workspace: Workspace, folder: Path, texts: list[str | None], speakers: list[str | None]) -> None:
    """Recordings of those texts by those speakers, an untrained encoder and its codebook."""
    folder.mkdir()
    rows = []
    for number, (text, speaker) in enumerate(zip(texts, speakers, strict=True)):
        file = sound_files.write(folder, f"{number}", sound_files.speech(1.0, number), "flac")
        split = "train" if number % 2 else "heldout"
        rows.append({"id": f"{number}", "path": str(file), "text": text, "speaker": speaker, "seconds": 1.0})
        rows[-1]["split"] = split
    workspace.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))
    add_encoder(workspace)


@pytest.mark.ray
def test_recordings_without_text_are_assessed_by_what_can_be_known_of_them(ray_cluster, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work")
    recorded(workspace, tmp_path / "sounds", [None] * 6, ["ana"] * 6)
    made = assess_units.run(Context(load("tiny", (NOTHING_ASKED,)), workspace, Progress(True), Run("", "")))
    report = workspace.read_json("reports/unit_quality.json")
    assert report == made["figures"] and report.keys() == {"encoder", "mfcc", "not_measured"}
    for kind in ("encoder", "mfcc"):
        assert report[kind].keys() == {"recordings"}
        assert report[kind]["recordings"].keys() == {"clips", "dead", "entropy_bits", "units_per_second"}
        assert report[kind]["recordings"]["clips"] == 6
        assert 0 < report[kind]["recordings"]["units_per_second"] <= 50
    assert report["not_measured"].keys() == {"agreement with phones", "speaker variance of recordings"}
    assert "no held-out question" in report["not_measured"]["agreement with phones"]


def test_speakers_of_the_same_text_are_compared(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work")
    recorded(workspace, tmp_path / "sounds", ["Good day!", "good day", "bye"], ["ana", "ben", "ana"])
    found = _assess(workspace, load("tiny", (NOTHING_ASKED,)), "mfcc", _recordings(workspace, 1))["recordings"]
    assert found["speaker_variance"] > 0


def test_questions_are_assessed_against_their_phones_beside_the_recordings(tmp_path: Path, monkeypatch) -> None:
    workspace = Workspace(tmp_path / "work")
    recorded(workspace, tmp_path / "sounds", [None] * 2, [None] * 2)
    monkeypatch.setattr(assess_units, "_TEXTS", 2)
    found = _assess(workspace, load("tiny"), "mfcc", _recordings(workspace, 1))
    assert 0 < found["pnmi"] < 1 and found["speaker_variance"] > 0 and found["recordings"]["clips"] == 2


def test_shared_texts_come_first_and_then_what_training_has_not_heard(tmp_path: Path, monkeypatch) -> None:
    workspace = Workspace(tmp_path / "work")
    texts = ["one", None, "two", "three", "two", "four"]
    recorded(workspace, tmp_path / "sounds", texts, ["ana", "ana", "ana", "ana", "ben", None])
    order = [row["id"] for row in _recordings(workspace, 1)]
    assert (set(order[:2]), order[2], set(order[3:])) == ({"2", "4"}, "0", {"1", "3", "5"})
    monkeypatch.setattr(assess_units, "_RECORDINGS", 3)
    assert [row["id"] for row in _recordings(workspace, 1)] == order[:3]


def test_nothing_to_hear_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no held-out question .* and no recording"):
        assess_units.run(Context(load("tiny", (NOTHING_ASKED,)), Workspace(tmp_path), Progress(True), Run("", "")))
