"""Sound files that are traps."""

import io
import struct

import numpy as np
import soundfile

EIGHT_HOURS = 8 * 3600
"""Seconds."""


def wav(rate: int, channels: int, data: bytes, promised: int | None = None) -> bytes:
    """A 16-bit WAV whose header says what it is told to."""
    width = channels * 2
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + head + struct.pack("<I", promised or len(data)) + data


def silence(seconds: float, rate: int, channels: int = 1, format: str = "FLAC") -> bytes:
    """Compressed, next to nothing."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, "PCM_16", format=format) as file:
        left = int(seconds * rate)
        while left:
            count = min(left, 1 << 20)
            file.write(np.zeros((count, channels), np.int16))
            left -= count
    return buffer.getvalue()


def babble(samples: int) -> bytes:
    time = np.arange(samples) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * (200 + 150 * time) * time)
    return (wave * 32767).astype("<i2").tobytes()
