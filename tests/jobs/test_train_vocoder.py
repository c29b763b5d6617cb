"""Vocoders of several speakers: whose clips they learn from, and what MLflow plays of them."""

from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import train_vocoder
from jobs.shards import RECORDINGS, Shard
from jobs.shell import JobError
from speechgpt import recipe as recipes
from speechgpt.recipe import Recipe
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.vocoder import UnitVocoder, Vocoder
from speechgpt.training.vocoding import Recording

SHARD = Shard("0", "speech/part-0.parquet", 0, 5)


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
    workspace.write_table(SHARD.file, pa.Table.from_pylist(clips))
    train_vocoder.ClipFeatures(workspace, recipe)(asdict(SHARD))
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


def test_recorded_speakers_are_learnt_from_their_recordings(tmp_path: Path) -> None:
    """Held-out clips, other speakers', silence and lost files are left out, and without a text nobody says the same."""
    two = "vocoder.generator={speakers: 2, head: istft, embedding_dim: 32, model_in_dim: 64, istft_channels: 32}"
    recipe = recipes.load("nano", (two, "vocoder.recorded=[ana, luis]", "vocoder.training.strangers=0.5"))
    assert train_vocoder.speakers(recipe) == ["ana", "luis"]
    workspace = Workspace(tmp_path / "work")
    for file in (resources.files("speechgpt") / "bundles" / "nano" / "encoder").iterdir():
        workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())
    rows = []
    for number, (speaker, split) in enumerate(
        [("ana", "train"), ("luis", "train"), ("ana", "heldout"), ("eva", "train"), (None, "train"), ("ana", "train")]
        + [("luis", "train")]
    ):
        wave = 0.3 * np.sin(np.arange(12_800) * 0.02 * (number + 1)).astype(np.float32)
        path = tmp_path / f"{number}.wav"
        if number < 6:
            path.write_bytes(audio.encode(wave, "wav") if number < 5 else b"RIFF but no sound")
        rows.append(dict(id=f"r{number}", path=str(path), speaker=speaker, split=split, sha256="0f" * 32))
    workspace.write_table(RECORDINGS, pa.Table.from_pylist(rows, UTTERANCE_SCHEMA))
    shard = Shard("recordings-00000-x", RECORDINGS, 0, len(rows))
    assert train_vocoder.ClipFeatures(workspace, recipe)(asdict(shard)) == {"clips": 2}
    clips = workspace.read_table("vocoder/clips/recordings-00000-x.parquet").to_pylist()
    assert [(clip["id"], clip["speaker"]) for clip in clips] == [("r0", 0), ("r1", 1)]
    assert [len(clip["strangers"]) for clip in clips] == [2, 2], "itself in another throat and room"
    np.testing.assert_array_equal(audio.decode(clips[0]["audio"]), audio.decode(tmp_path / "0.wav"))


def test_as_many_recorded_speakers_as_the_generator_has() -> None:
    with pytest.raises(JobError, match=r"speakers: 1, but vocoder.recorded names 2: \['ana', 'luis'\]"):
        train_vocoder.speakers(recipes.load("nano", ("vocoder.recorded=[ana, luis]",)))


def test_one_of_another_encoder_keeps_its_generator_and_is_not_used_untrained() -> None:
    shipped = Vocoder.load(str(resources.files("speechgpt") / "bundles" / "nano" / "vocoder")).model
    other = Codebook(torch.randn(40, 7, generator=torch.Generator().manual_seed(0)))
    model = train_vocoder.initial_model(recipes.load("nano", ("vocoder.training.steps=3",)), other)
    assert (model.centroid_dimensions, model.units, model.dict.weight.shape) == (7, 40, (40, 256))
    kept = shipped.generator.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in model.generator.state_dict().items())
    assert model.section.rounding == "running", "the recipe's"
    with pytest.raises(JobError, match="this one has 7; give vocoder.training.steps"):
        train_vocoder.initial_model(recipes.load("nano"), other)
