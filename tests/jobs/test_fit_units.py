"""Which clips the codebook is fitted on, and what is said about how it is used."""

from collections import Counter

import numpy as np
import pytest
import torch

from jobs.fit_units import Clip, sample, usage
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
    said = usage(book, [clip, clip])
    assert said["unused_units"] == 2
    assert said["entropy_bits"] == pytest.approx(1.0)
    assert said["units_per_second"] == pytest.approx(25.0), "two units in four frames of 20 ms"
    assert said["shares"] == [0.5, 0.5, 0.0, 0.0]
