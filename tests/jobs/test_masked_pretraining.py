"""HuBERT's own training as a job: two iterations on real Ray Train under DeepSpeed, then units of its encoder."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import fit_units, tokenize_speech, train_encoder
from jobs.shell import execute
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.hubert import HubertFeatures

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    "data.max_bad_fraction=1",
    "encoder.training={objective: masked, steps: 4, checkpoint_every: 2, batch_seconds: 8, workers: 2, augment: 0, "
    "teacher: {kind: mfcc, clusters: 20, frames: 2000}, masked: {layer: 1, clusters: 24, projection: 16}}",
    "codebook={clusters: 16, frames: 2000, iterations: 5}",
)


@pytest.fixture
def workspace(run_directory: Path) -> Workspace:
    """24 shipped recordings, as a file of `speech/`."""
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
    return place


def do(job, workspace: Workspace, recipe: Recipe) -> dict:
    return execute(job.JOB, recipe, workspace, json=True)["figures"]


def test_an_encoder_of_recordings_alone_that_units_are_made_with(ray_cluster, workspace):
    recipe = load("tiny", SETTINGS)
    figures = do(train_encoder, workspace, recipe)
    assert {"iteration_1_hidden_loss", "iteration_2_hidden_accuracy", "hidden_accuracy", "parameters"} <= figures.keys()
    assert figures["layer"] == 2 and figures["hours"] > 0
    made = {name for name in workspace.list("encoder") if "_done" not in name}
    assert made == {
        f"encoder/{name}"
        for name in ("config.json", "model.safetensors", "preprocessor_config.json", "unit_config.json")
    }, "what the iterations left is gone"
    fitted = do(fit_units, workspace, recipe)
    assert fitted["frames"] == 2000 and fitted["dead_units"] == 0
    assert do(tokenize_speech, workspace, recipe)["utterances"] == 24
    with workspace.fetch("encoder") as directory:
        assert HubertFeatures.load(directory).dimensions == Codebook.load(directory).centroids.shape[1]
    whole = workspace.read_bytes("encoder/model.safetensors")
    # As a kill in the second iteration leaves it: an older checkpoint, nothing of what is made at the end.
    left = Path(workspace.path("checkpoints/encoder/2")).glob("checkpoint_*")
    shutil.rmtree(max(each for each in left if each.is_dir()))
    for name in made:
        workspace.delete(name)
    again = do(train_encoder, workspace, recipe)
    assert workspace.read_bytes("encoder/model.safetensors") == whole
    assert again == figures
