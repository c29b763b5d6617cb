import numpy as np
import pytest

from speechgpt.speech import pitch


def voice(hertz: np.ndarray, harmonics: int = 12) -> np.ndarray:
    """A sawtooth-like tone that follows `hertz`, one value a frame."""
    phase = 2 * np.pi * np.cumsum(np.interp(np.arange(len(hertz) * 320) / 320, np.arange(len(hertz)), hertz)) / 16_000
    return (0.1 * sum(np.sin(k * phase) / k for k in range(1, harmonics + 1))).astype(np.float32)


@pytest.mark.parametrize(("first", "last"), [(75, 110), (120, 240), (300, 180), (420, 330)])
def test_it_follows_a_glide(first: float, last: float) -> None:
    hertz = np.linspace(first, last, 80)
    found = pitch.track(voice(hertz), 80)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[3:-3], hertz[3:-3], rtol=0.02)


def test_it_follows_through_noise_and_a_missing_fundamental() -> None:
    hertz = np.linspace(140, 200, 80)
    wave = voice(hertz) - voice(hertz, 1)
    wave += np.random.default_rng(0).normal(0, 0.1 * wave.std(), len(wave))
    np.testing.assert_allclose(pitch.track(wave, 80)[3:-3], hertz[3:-3], rtol=0.03)


def test_it_is_carried_through_what_is_unvoiced() -> None:
    wave = voice(np.full(60, 150.0))
    wave[20 * 320 : 40 * 320] = np.random.default_rng(0).normal(0, 0.05, 20 * 320)
    np.testing.assert_allclose(pitch.track(wave, 60), 150, rtol=0.06)


@pytest.mark.parametrize("wave", [np.zeros(3200), np.random.default_rng(0).normal(0, 0.1, 3200)])
def test_without_a_voice_it_is_what_it_says(wave: np.ndarray) -> None:
    assert (pitch.track(wave.astype(np.float32), 10) == pitch.UNKNOWN).all()


def test_more_frames_than_sound_are_filled() -> None:
    assert pitch.track(voice(np.full(10, 150.0)), 12).shape == (12,)
