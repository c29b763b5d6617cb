"""Which clips the codebook is fitted on, and what is said about how it is used."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import fit_units
from jobs.fit_units import Clip, Featurizer, _used, _within, sample, summary, training_clips
from jobs.shell import execute
from speechgpt.recipe import load
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


@pytest.mark.ray
def test_a_codebook_is_that_of_scikit_learn_and_the_same_each_time(ray_cluster, run_directory: Path):
    """Inertia within 1 % on the same frames, two runs the same bytes, on two actors."""
    recipe = load(
        "tiny",
        ("codebook={clusters: 16, frames: 8000, iterations: 20}", "resources.tokenisation={max_actors: 2, cpus: 1}"),
    )
    workspace = Workspace(run_directory)
    for part, job in (("manifest", "manifest"), ("speech", "synthesize"), ("encoder", "train-encoder")):
        workspace.write_json(f"{part}/_done/{job}.json", {"digest": "made by hand"})
    draw = np.random.default_rng(0)
    rows = []
    for number in range(40):
        tones = draw.integers(1, 30, 20) * 200
        wave = np.concatenate([0.3 * np.sin(2 * np.pi * hertz * np.arange(2400) / 16_000) for hertz in tones])
        sound = {"audio": audio.encode(wave.astype(np.float32), "flac"), "seconds": 3.0}
        rows.append({"id": f"{number}", "speaker": f"{number % 3}", "split": "train", **sound})
    rows.append({"id": "bad", "speaker": "0", "split": "train", "audio": b"no sound", "seconds": 3.0})
    workspace.write_table("speech/part-a.parquet", pa.Table.from_pylist(rows))
    with workspace.fetch("encoder") as folder:
        hubert.save(hubert.scratch(recipe.encoder.architecture, seed=1), folder, layer=2, normalize=True)
    done = execute(fit_units.JOB, recipe, workspace, json=True)["figures"]
    assert (done["frames"], done["clips"], done["dead_units"]) == (40 * 149, 41, 0)
    report = workspace.read_json("reports/units.json")
    assert report["inertia_course"][-1] == pytest.approx(report["inertia"], rel=1e-4)
    assert sum(report["shares"]) == pytest.approx(1, abs=1e-6)
    book = workspace.read_bytes("encoder/kmeans.safetensors")
    workspace.delete("encoder/kmeans.safetensors")
    execute(fit_units.JOB, recipe, workspace, json=True)
    assert workspace.read_bytes("encoder/kmeans.safetensors") == book
    drawn = sorted(sample(training_clips(workspace), recipe.codebook.frames, recipe.seed))
    frames = np.concatenate(Featurizer(workspace, recipe)._heard(drawn))
    _, theirs = codebook.fit(frames, 16, seed=recipe.seed, iterations=20)
    assert done["inertia"] == pytest.approx(theirs["inertia"], rel=0.01)
