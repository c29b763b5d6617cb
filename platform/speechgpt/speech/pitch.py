"""How high a voice is: one fundamental frequency for each frame of 20 ms, by autocorrelation."""

import numpy as np

from speechgpt.speech.audio import FRAME, SAMPLE_RATE

LOWEST, HIGHEST = 60.0, 450.0
"""Hz."""
UNKNOWN = 200.0
"""Hz, of a clip in which no frame is voiced."""
_WINDOW = 1024
_PERIODIC = 0.55
"""Autocorrelation, between 0 and 1, from which a frame counts as voiced."""
_AUDIBLE = 0.05
"""Of the loudest frame's level: what is quieter is not voiced."""
_FIRST_OF = 0.9
"""Of several periods about equally good the shortest is taken: its multiples fit as well."""


def track(wave: np.ndarray, frames: int) -> np.ndarray:
    """Pitch of each frame in Hz, float32 [frames], carried through what is unvoiced.

    wave: float32 [samples] at 16 kHz.
    """
    pieces = _windows(wave, frames)
    correlation = _autocorrelation(pieces)
    shortest, longest = int(SAMPLE_RATE / HIGHEST), int(SAMPLE_RATE / LOWEST)
    best = correlation[:, shortest : longest + 1].max(axis=1)
    inner = correlation[:, shortest : longest + 1]
    peak = (inner >= correlation[:, shortest - 1 : longest]) & (inner >= correlation[:, shortest + 1 : longest + 2])
    period = shortest + (peak & (inner >= _FIRST_OF * best[:, None])).argmax(axis=1)
    level = np.sqrt(np.square(pieces).mean(axis=1))
    voiced = (best > _PERIODIC) & (level > _AUDIBLE * level.max(initial=0.0) + 1e-4)
    if not voiced.any():
        return np.full(frames, UNKNOWN, np.float32)
    pitch = _without_jumps(np.log(SAMPLE_RATE / _between_samples(correlation, period))[voiced])
    return np.exp(np.interp(np.arange(frames), np.flatnonzero(voiced), pitch)).astype(np.float32)


def _windows(wave: np.ndarray, frames: int) -> np.ndarray:
    """[frames, window], each around its frame's middle."""
    margin = (_WINDOW - FRAME) // 2
    padded = np.pad(wave.astype(np.float64), (margin, margin + max(0, frames * FRAME - len(wave))))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[: frames * FRAME : FRAME]
    return (pieces - pieces.mean(axis=1, keepdims=True)) * np.hanning(_WINDOW)


def _autocorrelation(pieces: np.ndarray) -> np.ndarray:
    """[frames, lags], 1 at lag 0; the window's own is divided out, or long periods would look weak."""

    def raw(x: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.abs(np.fft.rfft(x, 2 * _WINDOW)) ** 2)[..., : _WINDOW // 2]

    window = raw(np.hanning(_WINDOW))
    found = raw(pieces)
    return found / (found[:, :1] + 1e-9) / (window / window[0])


def _between_samples(correlation: np.ndarray, period: np.ndarray) -> np.ndarray:
    """The top of the parabola through a peak and its neighbours."""
    rows = np.arange(len(period))
    before, at, after = (correlation[rows, period + shift] for shift in (-1, 0, 1))
    curve = before - 2 * at + after
    return period + np.clip(0.5 * (before - after) / np.where(curve < 0, curve, -1.0), -0.5, 0.5)


def _without_jumps(pitch: np.ndarray) -> np.ndarray:
    """Median of five: a single frame an octave off is an error."""
    from scipy.ndimage import median_filter

    return median_filter(pitch, size=5, mode="nearest")
