"""The packaged DNSMOS tells a clean voice from a spoilt one, and reads clips of any length."""

import numpy as np
import pytest

from speechgpt.evaluation.quality import DnsMos
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice


@pytest.fixture(scope="module")
def judge() -> DnsMos:
    pytest.importorskip("onnxruntime")
    return DnsMos()


def test_noise_is_heard(judge: DnsMos) -> None:
    clean = Voice(VoiceSection(engine="hibari")).say("the silver river is quiet in the evening", 0)
    noise = np.random.default_rng(0).normal(0, 0.1, len(clean)).astype(np.float32)
    good, bad = judge.rate([clean, clean + noise])
    assert good > 3.2 > bad + 0.5


def test_long_clips_are_rated_in_stretches(judge: DnsMos) -> None:
    wave = 0.1 * np.sin(np.arange(16_000 * 12) / 10).astype(np.float32)
    short, long = judge.rate([wave[:8000], wave])
    assert all(0 < score < 5 for score in (short, long))
