"""Speech as bytes of a sound format while it is made: resampled and encoded with state, so that the pieces join."""

from typing import Literal, Protocol, get_args

import numpy as np

from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.ffmpeg_encoder import FfmpegEncoder, Taken

StreamFormat = Literal["pcm16", "pcm", "mp3", "opus", "aac"]
"""Formats without a header that would have to know the sound's length."""


class SoundStream:
    """One clip. The joined bytes are the sound that `audio.encode` writes of the whole: in pcm to one step of 16 bits,
    in opus as its encoder hears it, in mp3 with the encoder's silence of 1105 samples before it.

    format: `pcm16` (and `pcm`, its OpenAI name) is headerless signed 16-bit little-endian. rate: of the bytes, in Hz
    (Opus: always 48 kHz inside). Raises ValueError for a format that cannot be streamed.
    """

    def __init__(self, format: str, rate: int = SAMPLE_RATE) -> None:
        import soxr

        if format not in get_args(StreamFormat):
            raise ValueError(f"audio format {format!r} cannot be streamed; {', '.join(get_args(StreamFormat))} can")
        self._resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(SAMPLE_RATE, rate, 1, dtype="float32")
        self._encoder = _encoder(format, rate)

    def push(self, wave: np.ndarray) -> bytes:
        """wave: float32 [samples] at 16 kHz. The bytes that are certain by now, perhaps none."""
        return self._push(wave, last=False)

    def finish(self) -> bytes:
        """No sound follows: the rest of the bytes."""
        return self._push(np.zeros(0, np.float32), last=True) + self._encoder.finish()

    def _push(self, wave: np.ndarray, last: bool) -> bytes:
        if self._resampler is not None:
            wave = self._resampler.resample_chunk(np.ascontiguousarray(wave, np.float32), last=last)
        return self._encoder.push(np.clip(wave, -1.0, 1.0)) if len(wave) else b""


class _Encoder(Protocol):
    def push(self, wave: np.ndarray) -> bytes: ...

    def finish(self) -> bytes: ...


def _encoder(format: str, rate: int) -> _Encoder:
    match format:
        case "mp3" | "aac":
            return FfmpegEncoder(format, rate)
        case "opus":
            return _Opus(rate)
    return _Pcm()


class _Pcm:
    def push(self, wave: np.ndarray) -> bytes:
        return (wave * 32767).astype("<i2").tobytes()

    def finish(self) -> bytes:
        return b""


class _Opus:
    def __init__(self, rate: int) -> None:
        import soundfile

        self._taken = Taken()
        self._encoder = soundfile.SoundFile(_NeverBack(self._taken), "w", rate, 1, format="OGG", subtype="OPUS")

    def push(self, wave: np.ndarray) -> bytes:
        self._encoder.write(wave)
        return self._taken.take()

    def finish(self) -> bytes:
        self._encoder.close()
        return self._taken.take()


class _NeverBack:
    """What libsndfile takes for a file; an Ogg is only ever appended to."""

    def __init__(self, taken: Taken) -> None:
        self._taken, self._at = taken, 0

    def write(self, data: bytes) -> int:
        self._at += len(data)
        return self._taken.file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        return b""
