"""Whether and when anybody speaks: noise and hum keep their level, speech rises and falls with every syllable."""

import numpy as np

from speechgpt.speech.audio import FRAME, SAMPLE_RATE

_SPEECH_DECIBELS = 8.0
"""Stationary noise stays within 5 dB; speech in noise of 5 dB spans 20 and more (tests/speech/test_activity.py)."""
_BAND = (250, 3000)
"""Hz: where vowels are, between rumble and hiss."""
_BLOCK = 3000 * FRAME
"""Samples that are filtered in one go."""


def is_speech(wave: np.ndarray) -> bool:
    """wave: float32 [samples] at 16 kHz, one frame of 20 ms or more."""
    return level_range(wave) > _SPEECH_DECIBELS


def level_range(wave: np.ndarray) -> float:
    """Decibels between the loud (95th percentile) and the quiet (10th) frames of 20 ms, in the band of vowels."""
    levels = 10 * np.log10(frame_energies(wave) + 1e-12)
    return float(np.percentile(levels, 95) - np.percentile(levels, 10))


def frame_energies(wave: np.ndarray) -> np.ndarray:
    """Mean square of each whole frame of 20 ms in the band of vowels, [frames].

    wave: float32 [samples] at 16 kHz; a memory-mapped one is read block by block, and the result is the same.
    """
    from scipy import signal

    filter_ = signal.butter(4, _BAND, "bandpass", fs=SAMPLE_RATE, output="sos")
    state = np.zeros((len(filter_), 2))
    found = []
    for start in range(0, max(len(wave), 1), _BLOCK):
        band, state = signal.sosfilt(filter_, np.array(wave[start : start + _BLOCK], np.float32), zi=state)
        found.append(np.mean(band[: len(band) // FRAME * FRAME].reshape(-1, FRAME) ** 2, axis=1))
    return np.concatenate(found)
