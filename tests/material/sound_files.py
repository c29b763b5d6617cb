"""Sound files as the world has them: ten formats that can be read, twelve kinds that cannot."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile

from speechgpt.speech import audio

RATE = 16_000
FORMATS = ("wav", "wav24", "float", "ulaw", "flac", "vorbis", "opus", "mp3", "m4a", "aiff")
_CONTAINERS = {
    "wav": ("WAV", "PCM_16"), "wav24": ("WAV", "PCM_24"), "float": ("WAV", "FLOAT"), "ulaw": ("WAV", "ULAW"),
    "flac": ("FLAC", "PCM_16"), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", None),
    "aiff": ("AIFF", "PCM_16"),
}  # fmt: skip
_ENDINGS = {"wav24": "wav", "float": "wav", "ulaw": "wav", "vorbis": "ogg"}


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(int(RATE * seconds))).clip(-1, 1).astype(np.float32)


def write(folder: Path, name: str, wave: np.ndarray, format: str) -> Path:
    """`wave` as a file of one of FORMATS."""
    file = folder / f"{name}.{_ENDINGS.get(format, format)}"
    if format == "m4a":
        write_m4a(file, wave)
    else:
        container, subtype = _CONTAINERS[format]
        soundfile.write(file, wave, RATE, format=container, subtype=subtype)
    return file


def write_m4a(file: Path, wave: np.ndarray) -> None:
    # With its index in front, as files for the web have it.
    with av.open(str(file), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("aac", rate=RATE)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def _wav(wave: np.ndarray, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="WAV", subtype=subtype)
    return buffer.getvalue()


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _m4a(folder: Path, wave: np.ndarray) -> bytes:
    write_m4a(folder / "whole.m4a", wave)
    data = (folder / "whole.m4a").read_bytes()
    (folder / "whole.m4a").unlink()
    return data


GOOD = speech(1.0, 99)
POISON: dict[str, tuple[str, Callable[[Path], bytes | None]]] = {
    "nothing.wav": ("empty", lambda folder: b""),
    "header-only.wav": ("empty", lambda folder: _wav(GOOD[:0])),
    "silent.wav": ("silent", lambda folder: _wav(np.zeros(RATE, np.float32))),
    "click.wav": ("too_short", lambda folder: _wav(GOOD[:100])),
    "lecture.flac": ("too_long", lambda folder: audio.encode(np.tile(GOOD, 40), "flac")),
    "nan.wav": ("not_finite", lambda folder: _wav(np.where(np.arange(RATE) == 7, np.nan, GOOD), "FLOAT")),
    "cut.wav": ("truncated", lambda folder: _cut(_wav(GOOD))),
    "cut.flac": ("truncated", lambda folder: _cut(audio.encode(GOOD, "flac"))),
    "cut.opus": ("truncated", lambda folder: _cut(audio.encode(np.tile(GOOD, 3), "opus"))),
    "cut.m4a": ("truncated", lambda folder: _cut(_m4a(folder, np.tile(GOOD, 3)))),
    "letter.mp3": ("unreadable", lambda folder: b"this is a letter, not a recording\n" * 40),
    "gone.ogg": ("missing_file", lambda folder: None),
}
"""{name: (reason, its bytes; None for a file that is not there)}; `lecture` is longer than 30 s."""


def poison(folder: Path) -> dict[str, str]:
    """Writes every kind; {path: reason}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, make) in POISON.items():
        data = make(folder)
        if data is not None:
            (folder / name).write_bytes(data)
    return {str(folder / name): reason for name, (reason, _) in POISON.items()}
