"""Which clips the codebook is fitted on, and what is said about how it is used."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fit_units_driver
import numpy as np
import pyarrow as pa
import pytest
import torch
from fit_units_driver import fit

from jobs import fit_units
from jobs.fit_units import Clip, Featurizer, _used, _within, sample, summary, training_clips
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio, codebook, hubert
from speechgpt.speech.codebook import Codebook

CLIPS = [Clip("f", n, f"loud{n}", "loud", 2.0) for n in range(90)]
CLIPS += [Clip("f", 90 + n, f"shy{n}", "shy", 2.0) for n in range(10)]


def test_rare_speakers_are_heard_as_often_as_common_ones():
    drawn = sample(CLIPS, frames=1000, seed=1)
    assert Counter(clip.speaker for clip in drawn) == {"loud": 5, "shy": 5}


def test_enough_clips_are_drawn_and_no_more():
    for frames in (1, 100, 101, 5000):
        drawn = sample(CLIPS, frames, seed=1)
        assert sum(clip.seconds for clip in drawn) * 50 >= frames
        assert sum(clip.seconds for clip in drawn[:-1]) * 50 < frames
    assert len(sample(CLIPS, frames=10**9, seed=1)) == len(CLIPS)


def test_no_more_turns_are_taken_than_are_needed(monkeypatch):
    turns = []
    monkeypatch.setattr(fit_units, "zip_longest", lambda *lists: map(lambda *turn: turns.append(turn) or turn, *lists))
    sample(CLIPS, frames=1000, seed=1)
    assert len(turns) == 6, "five of both speakers, and one to see that it is enough"


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    assert sample(CLIPS, 1000, seed=1) == sample(CLIPS[::-1], 1000, seed=1)
    assert sample(CLIPS, 1000, seed=1) != sample(CLIPS, 1000, seed=2)


def test_usage_counts_unused_units_evenness_and_rate():
    book = Codebook(torch.tensor([[0.0], [10.0], [20.0], [30.0]]))
    clip = np.array([[0.1], [0.2], [9.0], [9.5]], dtype=np.float32)
    said = summary(*_used(book.centroids.numpy(), [clip, clip]))
    assert said["unused_units"] == 2
    assert said["entropy_bits"] == pytest.approx(1.0)
    assert said["units_per_second"] == pytest.approx(25.0), "two units in four frames of 20 ms"
    assert said["shares"] == [0.5, 0.5, 0.0, 0.0]


def test_no_more_frames_take_part_than_asked_for():
    assert _within([5, 5, 5], 100) == [5, 5, 5]
    assert _within([5, 5, 5], 7) == [5, 2, 0]
    assert _within([], 7) == []


def corpus(workspace: Workspace, recipe: Recipe) -> None:
    """40 clips of three seconds by three speakers, two that cannot be used, and an untrained encoder."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(40):
        tones = draw.integers(1, 30, 20) * 200
        wave = np.concatenate([0.3 * np.sin(2 * np.pi * hertz * np.arange(2400) / 16_000) for hertz in tones])
        sound = {"audio": audio.encode(wave.astype(np.float32), "flac"), "seconds": 3.0}
        rows.append({"id": f"{number}", "speaker": f"{number % 3}", "split": "train", **sound})
    rows.append({"id": "bad", "speaker": "bad", "split": "train", "audio": b"no sound", "seconds": 0.01})
    rows.append({"id": "long", "speaker": "long", "split": "train", "audio": b"no sound", "seconds": 3600.0})
    workspace.write_table("speech/part-a.parquet", pa.Table.from_pylist(rows))
    with workspace.stage("encoder") as folder:
        hubert.save(hubert.scratch(recipe.encoder.architecture, seed=1), folder, layer=2, normalize=True)


CODEBOOK = "codebook={clusters: 16, frames: 5901, iterations: 20}"


@pytest.mark.ray
def test_a_codebook_is_that_of_scikit_learn_and_the_same_each_time(ray_cluster, tmp_path: Path, monkeypatch):
    """Inertia within 1 % on the same frames, two runs the same bytes, whatever the number of actors."""
    monkeypatch.setattr(fit_units, "_GROUP_SECONDS", 20.0)
    recipe = load("tiny", (CODEBOOK,))
    workspace = Workspace(tmp_path)
    corpus(workspace, recipe)
    done = fit(workspace, CODEBOOK)
    assert (done["frames"], done["clips"], done["speakers"], done["dead_units"]) == (5901, 40, 3, 0)
    report = workspace.read_json("reports/units.json")
    assert report["inertia_course"][-1] == pytest.approx(report["inertia"], rel=1e-4)
    assert sum(report["shares"]) == pytest.approx(1, abs=1e-6)
    book = workspace.read_bytes("encoder/kmeans.safetensors")
    workspace.delete("encoder/kmeans.safetensors")
    fit(workspace, CODEBOOK, "resources.tokenisation={max_actors: 1, cpus: 1}")
    assert workspace.read_bytes("encoder/kmeans.safetensors") == book
    drawn = sorted(sample(training_clips(workspace, recipe.data.max_seconds), recipe.codebook.frames, recipe.seed))
    frames = np.concatenate(Featurizer(workspace, recipe)._heard(drawn))[:5901]
    _, theirs = codebook.fit(frames, 16, seed=recipe.seed, iterations=20)
    assert done["inertia"] == pytest.approx(theirs["inertia"], rel=0.01)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_too_small_for_all_actors_that_loses_nodes_ends_in_the_same_bytes(
    ray_cluster, tmp_path: Path, monkeypatch
):
    """Eight actors are wanted and three fit; one node goes while frames are made, another between two passes."""
    monkeypatch.setattr(fit_units, "_GROUP_SECONDS", 12.0)
    recipe = load("tiny", (CODEBOOK,))
    whole, broken = (Workspace(tmp_path / name) for name in ("whole", "broken"))
    for workspace in (whole, broken):
        corpus(workspace, recipe)
    fit(whole, CODEBOOK)
    losses = json.dumps({"frames of the codebook": 3, "passes of k-means": 1})
    wanted = "resources.tokenisation={min_actors: 1, max_actors: 8, cpus: 1}"
    done = subprocess.run(
        [sys.executable, fit_units_driver.__file__, broken.uri, "12", losses, CODEBOOK, wanted],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for name in ("encoder/kmeans.safetensors", "reports/units.json"):
        assert broken.read_bytes(name) == whole.read_bytes(name)
