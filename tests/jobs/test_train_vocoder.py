"""Vocoders of several speakers: whose clips they learn from, and what MLflow plays of them."""

from importlib import resources

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import train_vocoder
from speechgpt import recipe as recipes
from speechgpt.recipe import Recipe
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.vocoder import UnitVocoder, Vocoder
from speechgpt.training.vocoding import Recording

SHARD = "speech/0.parquet"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    two = "vocoder.generator={speakers: 2, head: istft, embedding_dim: 32, model_in_dim: 64, istft_channels: 32}"
    return recipes.load("nano", (two, "vocoder.training.strangers=0.5"))


@pytest.fixture(scope="module")
def table(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What a shard of clips in four voices becomes, two of them speakers; one more clip is held out."""
    workspace = Workspace(tmp_path_factory.mktemp("work"))
    for file in (resources.files("speechgpt") / "bundles" / "nano" / "encoder").iterdir():
        workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())
    said = {"answer": "yes", "american": "yes", "heart": "yes", "british": "no"}
    clips = []
    for number, (voice, text) in enumerate(said.items()):
        wave = 0.3 * np.sin(np.arange(12_800) * 0.02 * (number + 1)).astype(np.float32)
        clip = dict(id=f"c{number}", voice=voice, text=text, split="train", audio=audio.encode(wave, "wav"))
        clips.append({**clip, "sha256": "0f" * 32})
    clips.append({**clips[0], "id": "c9", "split": "heldout"})
    workspace.write_table(SHARD, pa.Table.from_pylist(clips))
    train_vocoder.ClipFeatures(workspace, recipe)({"file": SHARD})
    return workspace.read_table("vocoder/clips/0.parquet")


def test_each_speaker_s_clips_are_taken_in_and_the_others_say_the_same(table: pa.Table) -> None:
    rows = {row["id"]: row for row in table.to_pylist()}
    assert {name: row["speaker"] for name, row in rows.items()} == {"c0": 0, "c1": 1}
    # Of the two other voices that say yes, each in the features' own layout.
    assert [len(row["strangers"]) for row in rows.values()] == [2, 2]
    assert rows["c0"]["features"] != rows["c1"]["features"]


def test_samples_are_of_every_speaker_and_each_sounds_its_own(recipe: Recipe, table: pa.Table) -> None:
    torch.manual_seed(0)
    with resources.as_file(resources.files("speechgpt") / "bundles" / "nano" / "encoder") as encoder:
        codebook = Codebook.load(encoder)
    vocoder = Vocoder(UnitVocoder(recipe.vocoder.generator, codebook.clusters))
    frames = np.frombuffer(table["features"][0].as_py(), np.float16).reshape(-1, codebook.centroids.shape[1])

    def recording(index: int) -> Recording:
        # The same units for both, so that only the voice can tell them apart.
        wave = audio.decode(table["audio"][index].as_py())
        return Recording(wave, frames, np.zeros(len(frames), np.float32), (), table["speaker"][index].as_py())

    samples = train_vocoder._heard(vocoder, codebook, recording, table)
    assert [sample["speaker"] for sample in samples] == [0, 0, 1, 1]
    assert samples[1]["units"] == samples[3]["units"]
    assert not np.allclose(samples[1]["sound"], samples[3]["sound"])
    assert len(samples[0]["sound"]) == 12_800
