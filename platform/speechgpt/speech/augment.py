"""What rooms, telephones and other throats do to speech, with the frame targets kept in step."""

import numpy as np

from speechgpt.speech.audio import FRAME, MIN_SAMPLES, SAMPLE_RATE
from speechgpt.speech.hubert import frame_count


def augment(wave: np.ndarray, targets: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One random change of a clip. wave: float32 [samples]; targets: [frames].

    Vocal-tract length, pitch and speed change together (by resampling) most of the time; half the clips begin in the
    middle of something; each of room, noise and telephone band some of the time. Returns the new clip and its targets,
    one a frame.
    """
    if draw.random() < 0.5:
        wave, targets = begun_anywhere(wave, targets, draw)
    if draw.random() < 0.8:
        wave, targets = resampled(wave, targets, draw.uniform(0.84, 1.19))
    return in_surroundings(wave, draw), targets


def recorded(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """As somebody records it who presses a button: a pause before and after, some microphone, room, noise and level."""
    before, after = draw.uniform(0.0, 0.7, 2) * SAMPLE_RATE
    wave = np.pad(wave, (int(before), int(after)))
    # No microphone gives digital silence.
    wave = in_surroundings(wave + draw.normal(0, 10 ** draw.uniform(-4.5, -3.3), len(wave)), draw)
    return (wave * draw.uniform(0.1, 1.4) / max(1.0, 1.4 * np.abs(wave).max())).astype(np.float32)


def disguised(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """From another throat, in other surroundings, and to the sample as long: what is said when stays."""
    return in_surroundings(shifted(wave, draw.uniform(0.8, 1.25)), draw)


def in_surroundings(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Each of room, telephone band, another microphone and noise some of the time; the length stays."""
    if draw.random() < 0.25:
        wave = reverberated(wave, draw.uniform(0.1, 0.5), draw)
    if draw.random() < 0.2:
        wave = band_limited(wave, draw.uniform(100, 350), draw.uniform(3000, 3800))
    elif draw.random() < 0.3:
        wave = tilted(wave, draw.uniform(-0.6, 0.6))
    if draw.random() < 0.5:
        wave = noised(wave, draw.uniform(8, 35), draw)
    return wave.astype(np.float32)


def begun_anywhere(wave: np.ndarray, targets: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Without up to half a second of its beginning, and never more than half of it.

    Not by whole frames: a new frame keeps the target of the old one that began nearest.
    """
    cut = int(draw.integers(max(1, min(SAMPLE_RATE // 2, len(wave) // 2 - MIN_SAMPLES))))
    wave = wave[cut:]
    frames = np.minimum(np.arange(frame_count(len(wave))) + (cut + FRAME // 2) // FRAME, len(targets) - 1)
    return wave, targets[frames]


def resampled(wave: np.ndarray, targets: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Played `factor` times faster and higher; each new frame keeps the target of the moment it came from."""
    length = int(len(wave) / factor)
    moved = np.interp(np.arange(length) * factor, np.arange(len(wave)), wave)
    frames = np.minimum(np.round(np.arange(frame_count(length)) * factor).astype(int), len(targets) - 1)
    return moved, targets[frames]


def shifted(wave: np.ndarray, factor: float) -> np.ndarray:
    """Pitch and formants `factor` times higher at the same pace: a phase vocoder stretches, resampling shortens."""
    from scipy import signal

    window, hop = 512, 128
    _, _, spectrum = signal.stft(wave, nperseg=window, noverlap=window - hop)
    at = np.arange(0, spectrum.shape[1] - 1, 1 / factor)
    before, share = at.astype(int), at % 1
    magnitude = np.abs(spectrum)
    magnitude = magnitude[:, before] * (1 - share) + magnitude[:, before + 1] * share
    # Each frame's phase goes on from the last by what passes in a hop at that place of the original.
    advance = np.angle(spectrum[:, before + 1]) - np.angle(spectrum[:, before])
    phase = np.cumsum(np.c_[np.angle(spectrum[:, :1]), advance[:, :-1]], axis=1)
    _, stretched = signal.istft(magnitude * np.exp(1j * phase), nperseg=window, noverlap=window - hop)
    return np.interp(np.arange(len(wave)) * factor, np.arange(len(stretched)), stretched)


def reverberated(wave: np.ndarray, seconds: float, draw: np.random.Generator) -> np.ndarray:
    """In a room whose echo falls by 60 dB in `seconds`: exponentially decaying noise after the direct sound."""
    tail = int(seconds * SAMPLE_RATE)
    echo = draw.standard_normal(tail) * np.exp(-6.9 * np.arange(tail) / tail) * draw.uniform(0.02, 0.08)
    echo[0] = 1.0
    size = len(wave) + tail
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(echo, size), size)[: len(wave)]


def band_limited(wave: np.ndarray, low: float, high: float) -> np.ndarray:
    """Through a telephone: nothing below `low` or above `high` Hz."""
    spectrum = np.fft.rfft(wave)
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, len(wave))


def tilted(wave: np.ndarray, coefficient: float) -> np.ndarray:
    """Another microphone: a first-order filter that favours low (negative) or high (positive) frequencies."""
    return wave - coefficient * np.r_[0.0, wave[:-1]]


def noised(wave: np.ndarray, decibels: float, draw: np.random.Generator) -> np.ndarray:
    """Coloured noise added at a signal-to-noise ratio of `decibels`."""
    noise = tilted(
        np.cumsum(draw.standard_normal(len(wave))) if draw.random() < 0.3 else draw.standard_normal(len(wave)), 0.97
    )
    power = np.mean(wave**2) / (np.mean(noise**2) * 10 ** (decibels / 10) + 1e-12)
    return wave + noise * np.sqrt(power)
