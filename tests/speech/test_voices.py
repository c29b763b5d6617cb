from pathlib import Path

import numpy as np
import pytest

from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice, VoiceError, aligned

VOICES = {
    "tone": VoiceSection(engine="tone", speed=(0.9, 1.1)),
    "espeak": VoiceSection(engine="espeak", voice="en-us+f2", speed=(0.9, 1.1), pitch=(-2, 2)),
    "hibari": VoiceSection(engine="hibari", speed=(0.9, 1.1), pitch=(-2, 2)),
    "piper": VoiceSection(engine="piper", voice="joe"),
}


@pytest.mark.parametrize("name", VOICES)
def test_the_same_seed_says_the_same_samples_in_any_order(name: str) -> None:
    voice = Voice(VOICES[name])
    first = voice.say("what is two plus three", 1)
    voice.say("something else", 2)
    again = voice.say("what is two plus three", 1)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert 0.5 < len(first) / 16_000 < 4
    assert 0.5 < np.abs(first).max() <= 0.61


def test_another_seed_speaks_at_another_speed() -> None:
    voice = Voice(VOICES["espeak"])
    assert len({len(voice.say("two plus three is five", seed)) for seed in range(4)}) > 1


def test_a_voice_that_is_not_there_is_named() -> None:
    with pytest.raises(VoiceError, match="xx-none"):
        Voice(VoiceSection(engine="espeak", voice="xx-none")).say("hello", 0)


def test_kokoro_without_its_styles_says_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPEECHGPT_KOKORO_VOICES", str(tmp_path))
    with pytest.raises(VoiceError, match=r"am_adam\.bin.*kokoro-js"):
        Voice(VoiceSection(engine="kokoro", voice="am_adam"))
    (tmp_path / "am_adam.bin").write_bytes(b"")
    monkeypatch.setattr("speechgpt.speech.voices.find_spec", lambda name: None)
    with pytest.raises(VoiceError, match=r"speechgpt-ray\[kokoro\]"):
        Voice(VoiceSection(engine="kokoro", voice="am_adam"))


def test_every_frame_has_the_phoneme_that_sounds() -> None:
    wave, phonemes = aligned("she sees", "en-us+f2")
    assert len(phonemes) == len(wave) // 320
    assert "S" in phonemes and any(name.startswith("i") for name in phonemes)
    voiced = wave[: len(phonemes) * 320].reshape(-1, 320)
    treble = np.abs(np.diff(voiced)).mean(1) / (np.abs(voiced).mean(1) + 1e-6)
    hiss = [t for t, name in zip(treble, phonemes, strict=True) if name in ("S", "s")]
    vowels = [t for t, name in zip(treble, phonemes, strict=True) if name.startswith("i")]
    assert np.median(hiss) > 1.5 * np.median(vowels), "hissing frames are where the fricatives are said to be"
