"""The packaged raters tell a clean voice from a spoilt one, and read clips of any length."""

import sys

import numpy as np
import pytest

from speechgpt.evaluation.quality import DistillMos, DnsMos, Rater, raters
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice


@pytest.fixture(scope="module", params=[DnsMos, DistillMos])
def judge(request: pytest.FixtureRequest) -> Rater:
    return request.param()


def test_noise_is_heard(judge: Rater) -> None:
    clean = Voice(VoiceSection(engine="hibari")).say("the silver river is quiet in the evening", 0)
    noise = np.random.default_rng(0).normal(0, 0.1, len(clean)).astype(np.float32)
    good, bad = judge.rate([clean, clean + noise])
    assert good > 3.2 > bad + 0.5


def test_clips_of_any_length_are_rated(judge: Rater) -> None:
    wave = 0.1 * np.sin(np.arange(16_000 * 12) / 10).astype(np.float32)
    short, long = judge.rate([wave[:8000], wave])
    assert all(0 < score < 5 for score in (short, long))


def test_all_that_are_installed_rate() -> None:
    assert list(raters()) == ["dnsmos", "distillmos"]
    assert "torchaudio" not in sys.modules
