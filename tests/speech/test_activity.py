import json
from importlib import resources

import numpy as np
import pytest

from speechgpt.speech import audio
from speechgpt.speech.activity import is_speech, level_range
from speechgpt.speech.augment import noised
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice

TIME = np.arange(3 * 16_000) / 16_000
DRAW = np.random.default_rng(0)
NOISES = {
    "white": DRAW.normal(0, 0.05, len(TIME)),
    "brown": np.cumsum(DRAW.normal(0, 0.01, len(TIME))),
    "hum": 0.2 * np.sin(2 * np.pi * 50 * TIME) + 0.05 * np.sin(2 * np.pi * 150 * TIME),
    "whistle": 0.3 * np.sin(2 * np.pi * 1000 * TIME) + DRAW.normal(0, 0.001, len(TIME)),
    "fan": np.convolve(DRAW.normal(0, 0.1, len(TIME)), np.hanning(40), "same") + DRAW.normal(0, 0.01, len(TIME)),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_not_speech(name):
    assert not is_speech(NOISES[name].astype(np.float32)), level_range(NOISES[name])


def test_every_shipped_recording_is_speech():
    folder = resources.files("speechgpt") / "recordings"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) > 100
    for row in rows:
        assert is_speech(audio.decode((folder / row["path"]).read_bytes())), row["path"]


@pytest.mark.parametrize(
    "section", [VoiceSection(engine="hibari"), VoiceSection(engine="espeak"), VoiceSection(engine="piper", voice="joe")]
)
def test_voices_are_heard_through_noise(section):
    for text in ("yes", "what is two plus three"):
        spoken = Voice(section).say(text, 1)
        assert is_speech(spoken)
        assert is_speech(noised(np.pad(spoken, 8000), 5.0, np.random.default_rng(1)))
