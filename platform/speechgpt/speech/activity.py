"""Whether anybody speaks: noise and hum keep their level, speech rises and falls with every syllable."""

import numpy as np

from speechgpt.speech.audio import FRAME, SAMPLE_RATE

_SPEECH_DECIBELS = 8.0
"""Stationary noise stays within 5 dB; speech in noise of 5 dB spans 20 and more (tests/speech/test_activity.py)."""
_BAND = (250, 3000)
"""Hz: where vowels are, between rumble and hiss."""


def is_speech(wave: np.ndarray) -> bool:
    """wave: float32 [samples] at 16 kHz, one frame of 20 ms or more."""
    return level_range(wave) > _SPEECH_DECIBELS


def level_range(wave: np.ndarray) -> float:
    """Decibels between the loud (95th percentile) and the quiet (10th) frames of 20 ms, in the band of vowels."""
    from scipy import signal

    band = signal.sosfilt(signal.butter(4, _BAND, "bandpass", fs=SAMPLE_RATE, output="sos"), wave)
    frames = band[: len(band) // FRAME * FRAME].reshape(-1, FRAME)
    levels = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    return float(np.percentile(levels, 95) - np.percentile(levels, 10))
