"""The job `train-text-to-unit`: which clips it learns from, and a small training on real Ray Train."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs import train_text_to_unit
from jobs.shell import JobError, execute
from jobs.tokenize_speech import UNITS_SCHEMA
from jobs.train_text_to_unit import MODEL, pairs, split
from speechgpt.language.text_to_unit import TextToUnit
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace
from speechgpt.training.text_to_unit import Pair

SETTINGS = (
    "text_to_unit.architecture={d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 16, decoder_ffn_dim: 16, max_position_embeddings: 64}",
    "text_to_unit.steps=6",
    "text_to_unit.checkpoint_every=4",
    "text_to_unit.text_vocabulary=270",
)


def recipe_of(*more: str) -> Recipe:
    return load("tiny", (*SETTINGS, *more))


def fill(workspace: Workspace, recipe: Recipe) -> None:
    plain = {"split": "train", "stranger": False, "speaker": "ann", "voice": None, "text": "a bee"}
    mine = {**plain, "voice": recipe.voices.answer}
    clips = [
        *(
            {**mine, "utterance_id": f"a{n:02}", "text": f"bee number {n}", "units": [n, 1 + n % 3, 30]}
            for n in range(24)
        ),
        {**mine, "utterance_id": "held", "split": "heldout", "units": [3]},
        {**mine, "utterance_id": "silent", "units": []},
        {**mine, "utterance_id": "nameless", "text": None, "units": [4]},
        {**plain, "utterance_id": "other", "units": [5, 6]},
        {**plain, "utterance_id": "stranger", "stranger": True, "units": [7]},
    ]
    workspace.write_table("units/part-a.parquet", pa.Table.from_pylist(clips, UNITS_SCHEMA))
    workspace.write_json("units/_done/tokenize.json", {"digest": "made by hand"})


def test_it_learns_from_training_clips_with_a_text(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    fill(workspace, recipe_of())
    found = pairs(workspace, recipe_of())
    assert found == [Pair(f"bee number {n}", (n, 1 + n % 3, 30)) for n in range(24)]
    everybody = pairs(workspace, recipe_of("text_to_unit.speakers=all"))
    assert everybody == [*found, Pair("a bee", (5, 6))]


def test_too_few_clips_say_what_would_help(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    recipe = recipe_of()
    fill(workspace, recipe)
    table = workspace.read_table("units/part-a.parquet")
    workspace.write_table("units/part-a.parquet", table.slice(20))
    with pytest.raises(JobError, match=r"4 training clips in the voice .*text_to_unit\.speakers=all"):
        pairs(workspace, recipe)


def test_a_text_is_either_learnt_or_measured():
    found = [Pair(f"text {n % 40}", (n,)) for n in range(200)]
    training, held = split(found, 10)
    assert 10 <= len(held) <= 14 and len(training) + len(held) == 200
    assert not {pair.text for pair in training} & {pair.text for pair in held}
    assert split(found[::-1], 10)[1] == held[::-1]
    assert len(split(found[:30], 200)[1]) == 3, "at most a tenth"


def test_a_model_of_more_units_than_the_codebook_has_is_refused(tmp_path: Path):
    from speechgpt.training.text_to_unit import scratch

    recipe = recipe_of()
    scratch(recipe.text_to_unit, ["a bee"], 33, 1).save(tmp_path / "model")
    taken = recipe_of(f"text_to_unit.init={tmp_path / 'model'}")
    with pytest.raises(JobError, match="writes 33 units; the codebook has 32"):
        execute(train_text_to_unit.JOB, taken, Workspace(str(tmp_path / "run")), json=True)


@pytest.mark.ray
@pytest.mark.slow
def test_it_trains_on_two_workers(ray_cluster, run_directory: Path):
    recipe, workspace = recipe_of("text_to_unit.workers=2"), Workspace(str(run_directory))
    fill(workspace, recipe)
    done = execute(train_text_to_unit.JOB, recipe, workspace, json=True)
    assert {"loss", "unit_loss", "unfinished", "parameters"} <= set(done["figures"])
    assert done["figures"]["pairs"] == 24 and done["figures"]["measured_pairs"] == 2
    with workspace.fetch(MODEL) as directory:
        maker = TextToUnit.load(directory)
    assert len(maker.unit_ids) == recipe.codebook.clusters
    assert all(unit < 32 for units in maker.write(["bee number 3"]) for unit in units)
    assert execute(train_text_to_unit.JOB, recipe, workspace, json=True)["skipped"]
