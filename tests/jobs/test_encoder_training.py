"""Training an encoder as a job, on real Ray Train under DeepSpeed, then units of it; and which clips it learns from."""

import json
import shutil
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import encoder_targets, fit_units, labelled_clips, tokenize_speech, train_encoder
from jobs.encoder_targets import Labelling, TeacherSample, _asked, _clips
from jobs.shards import RECORDINGS, Shard
from jobs.shell import JobError, execute
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.hubert import HubertFeatures
from speechgpt.training import hearing

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    "data.max_bad_fraction=1",
    "encoder.training={steps: 4, checkpoint_every: 2, batch_seconds: 8, augment: 0.5, "
    "teacher: {kind: mfcc, clusters: 20, frames: 2000}, masked: {layer: 1, clusters: 24, projection: 16}}",
    "codebook={clusters: 16, frames: 2000, iterations: 5}",
)
MADE = {
    f"encoder/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json", "unit_config.json")
}


@pytest.fixture
def workspace(run_directory: Path) -> Workspace:
    """24 shipped recordings, as files of `speech/`, beside shards that have none to learn from."""
    folder = resources.files("speechgpt") / "recordings"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][:24]
    clips = [
        {
            "id": row["id"],
            "audio": (folder / row["path"]).read_bytes(),
            "speaker": row.get("speaker", ""),
            "seconds": float(row["seconds"]),
            "split": "train",
            "stranger": False,
        }
        for row in rows
    ]
    place = Workspace(run_directory)
    for part, job in (("manifest", "manifest"), ("speech", "synthesize")):
        place.write_json(f"{part}/_done/{job}.json", {"digest": "made by hand"})
    for name in "ab":
        place.write_table(f"speech/part-{name}.parquet", pa.Table.from_pylist(clips["ab".index(name) :: 2]))
    place.write_table("speech/part-c.parquet", pa.Table.from_pylist([{**clips[0], "split": "heldout"}]))
    long = audio.encode(np.zeros(31 * audio.SAMPLE_RATE, np.float32), "flac")
    place.write_table("speech/part-d.parquet", pa.Table.from_pylist([{**clips[0], "audio": long, "seconds": 31.0}]))
    return place


def do(job, workspace: Workspace, recipe: Recipe) -> dict:
    return execute(job.JOB, recipe, workspace, json=True)["figures"]


def train(workspace: Workspace, objective: str, workers: int) -> tuple[Recipe, dict]:
    chosen = f"encoder.training.objective={objective}", f"encoder.training.workers={workers}"
    recipe = load("tiny", (*SETTINGS, *chosen))
    figures = do(train_encoder, workspace, recipe)
    assert {"hours", "parameters", "teacher_clusters"} <= figures.keys() and figures["layer"] == 2
    assert {name for name in workspace.list("encoder") if "_done" not in name} == MADE, "what it left is gone"
    return recipe, figures


def test_an_encoder_that_hears_what_its_teacher_hears(ray_cluster, workspace):
    _, figures = train(workspace, "distil", workers=1)
    assert 0 <= figures["frame_accuracy"] <= 1 and figures["frame_loss"] > 0


@pytest.mark.timeout(1800)
def test_an_encoder_of_recordings_alone_that_units_are_made_with(ray_cluster, workspace):
    recipe, figures = train(workspace, "masked", workers=2)
    assert {"iteration_1_hidden_loss", "iteration_2_hidden_accuracy", "hidden_accuracy"} <= figures.keys()
    fitted = do(fit_units, workspace, recipe)
    assert fitted["frames"] == 2000 and fitted["dead_units"] == 0
    assert do(tokenize_speech, workspace, recipe)["utterances"] == 25
    with workspace.fetch("encoder") as directory:
        assert HubertFeatures.load(directory).dimensions == Codebook.load(directory).centroids.shape[1]
    whole = workspace.read_bytes("encoder/model.safetensors")
    # As a kill in the second iteration leaves it: an older checkpoint, nothing of what is made at the end.
    left = Path(workspace.path("checkpoints/encoder/2")).glob("checkpoint_*")
    shutil.rmtree(max(each for each in left if each.is_dir()))
    for name in MADE:
        workspace.delete(name)
    again = do(train_encoder, workspace, recipe)
    assert workspace.read_bytes("encoder/model.safetensors") == whole
    assert again == figures


def test_what_a_teacher_is_asked_does_not_grow_with_the_corpus(workspace, monkeypatch):
    recipe = load("tiny", SETTINGS)

    def sample(name: str, asked: int) -> dict:
        shard = asdict(Shard(name, f"speech/part-{name}.parquet", 0, 12))
        return TeacherSample(workspace, recipe, Labelling("x", 20), asked)(shard)

    few = sample("a", 100)
    assert len(few["frames"]) // 4 // few["dimensions"] == 48, "of 12 clips four frames each: twice 2000 of 100 shards"
    assert sample("a", 100) == few != sample("b", 100)
    assert sample("c", 100)["frames"] == sample("d", 100)["frames"] == b""
    found = [Shard(name, f"speech/part-{name}.parquet", 0, 12) for name in "abc"]
    assert _asked(workspace, found, seed=1) == found
    monkeypatch.setattr(encoder_targets, "_SAMPLED_CLIPS", 2)
    assert {shard.name for shard in _asked(workspace, found, seed=1)} == {"a", "b"}
    monkeypatch.setattr(encoder_targets, "_SAMPLED_CLIPS", 1)
    assert {_asked(workspace, found, seed)[0].name for seed in range(9)} == {"a", "b"}


def test_a_recording_is_what_its_path_names_whatever_else_its_row_holds(workspace, tmp_path):
    (tmp_path / "a.flac").write_bytes(workspace.read_table("speech/part-a.parquet")["audio"][0].as_py())
    rows = [{"id": "a", "path": str(tmp_path / "a.flac"), "split": "train", "audio": "other.wav"}]
    workspace.write_table(RECORDINGS, pa.Table.from_pylist(rows))
    [(flac, wave)] = _clips(workspace, Shard("recordings", RECORDINGS, 0, 1), 60.0)
    assert audio.decode(flac) == pytest.approx(wave, abs=1e-4)


def test_clips_are_found_by_number_and_few_are_held(workspace, monkeypatch):
    labelling = Labelling("encoder/iterations/1", 20)
    written = {}
    for name in ("a", "b"):
        rows = workspace.read_table(f"speech/part-{name}.parquet").to_pylist()
        table = [
            {"audio": row["audio"], "targets": [ord(name), at], "seconds": row["seconds"]}
            for at, row in enumerate(rows)
        ]
        workspace.write_table(f"{labelling.targets}/{name}.parquet", pa.Table.from_pylist(table))
        written[name] = table
    seconds = labelled_clips.write_index(workspace, labelling, workers=1)
    assert seconds == pytest.approx(sum(row["seconds"] for table in written.values() for row in table))
    with pytest.raises(JobError, match="21 clips to learn from for 22 workers"):
        labelled_clips.write_index(workspace, labelling, workers=22)
    monkeypatch.setattr(hearing, "WINDOW", 2)
    clips = labelled_clips.LabelledClips(workspace, labelling, seed=3)
    assert len(clips.pieces) == 4 and [len(clips.kept_out), len(clips.seconds)] == [3, 24]
    learnt = {int(number) for piece in clips.pieces for number in piece}
    assert len(learnt) == 21
    for number in reversed(range(24)):
        name, at = "ab"[number // 12], number % 12
        clip = clips[number]
        assert clip.targets.tolist() == [ord(name), at]
        assert len(clip.wave) / 16_000 == pytest.approx(clips.seconds[number], abs=0.02)
    assert clips._piece.cache_info().currsize == 2
    kept_out = {tuple(clip.targets) for clip in clips.kept_out}
    assert kept_out == {(ord("ab"[number // 12]), number % 12) for number in set(range(24)) - learnt}
