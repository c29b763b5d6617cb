"""Sound files in and out: any rate, any channel count, to 16 kHz mono float32 and back."""

import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from speechgpt.speech.ffmpeg_encoder import FfmpegEncoder
from speechgpt.speech.whole_files import is_cut_off

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16_000
FRAME = 320
"""Samples in one unit frame (20 ms): the stride of HuBERT's convolutions."""
MIN_SAMPLES = 400
"""HuBERT's receptive field: a shorter clip has no frame (SPEC 3.2)."""
SILENCE = 1e-4
"""Peak amplitude below which nobody is speaking (-80 dBFS)."""

Reason = Literal["empty", "unreadable", "truncated", "too_short", "too_long", "too_large", "not_finite", "silent"]
AudioFormat = Literal["wav", "flac", "mp3", "opus", "aac", "pcm16", "pcm"]
_CONTAINERS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}


class AudioError(ValueError):
    """Audio that cannot become units. `reason` is a stable slug, `detail` says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.detail)


def decode(source: bytes | str | os.PathLike, *, max_seconds: float | None = None) -> np.ndarray:
    """Read one sound file, mix it down to mono and resample it to 16 kHz.

    source: the file's bytes, or its path. max_seconds: longer sound is refused before it is decoded, and
    so is what takes more memory than that long a studio recording would.
    Returns float32 [samples]. Raises AudioError; FileNotFoundError for a path that is not there.
    """
    import soxr

    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read()
    if not source:
        raise AudioError("empty", "the file has no bytes")
    wave, rate = _read(source, max_seconds)
    if not len(wave):
        raise AudioError("empty", "the file has no samples")
    if not np.isfinite(wave).all():
        raise AudioError("not_finite", "the file has NaN or infinite samples")
    mono = wave.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    _check_sound(len(mono), float(np.abs(mono).max(initial=0.0)))
    return np.ascontiguousarray(mono, dtype=np.float32)


def decode_onto_disk(source: str | os.PathLike, target: str | os.PathLike) -> np.ndarray:
    """`decode` for a file of any length, block by block: the samples go to the file `target`, memory-mapped.

    Returns float32 [samples], read-only; deleting `target` is the caller's. Raises as `decode` does. Files that
    libsndfile cannot read (AAC) are read whole.
    """
    peak, count = 0.0, 0
    with open(target, "wb") as samples:
        for block in _mono_blocks(Path(source)):
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            count += len(block)
            samples.write(np.ascontiguousarray(block, dtype=np.float32).tobytes())
    _check_sound(count, peak)
    return np.memmap(target, np.float32, "r")


def encode(wave: np.ndarray, format: str, rate: int = SAMPLE_RATE) -> bytes:
    """Write 16 kHz mono float sound as a file of `format`, at `rate` Hz (Opus: always 48 kHz inside).

    `pcm16` (and `pcm`, its OpenAI name) is headerless signed 16-bit little-endian. Raises ValueError for other formats.
    """
    import soundfile
    import soxr

    if format not in get_args(AudioFormat):
        raise ValueError(f"audio format {format!r} is not one of {', '.join(get_args(AudioFormat))}")
    if rate != SAMPLE_RATE:
        wave = soxr.resample(wave, SAMPLE_RATE, rate)
    clipped = np.clip(wave, -1.0, 1.0)
    if format in ("pcm16", "pcm"):
        return (clipped * 32767).astype("<i2").tobytes()
    if format == "aac":
        encoder = FfmpegEncoder("aac", rate)
        return encoder.push(clipped) + encoder.finish()
    container, subtype = _CONTAINERS[format]
    buffer = io.BytesIO()
    soundfile.write(buffer, clipped, rate, format=container, subtype=subtype)
    return buffer.getvalue()


_NOT_TO_ITS_END = "the file begins well and cannot be decoded to its end"
_ENDS_TOO_SOON = "the file ends before its sound does"
_UNKNOWN = 2**63 - 1
"""Frames that libsndfile says of FLAC that was streamed into a file, whose header does not tell its length."""


def _read(data: bytes, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """float32 [samples, channels] and rate, by libsndfile, or by FFmpeg's libraries for what that cannot read (AAC)."""
    import soundfile

    try:
        with _opened(io.BytesIO(data)) as file:
            if file.frames != _UNKNOWN:
                _check_length(file.frames / file.samplerate, max_seconds)
            limit = file.frames if max_seconds is None else min(file.frames, int(max_seconds * file.samplerate) + 1)
            if max_seconds is not None:
                _check_size(limit * file.channels, max_seconds)
            try:
                wave = _read_blocks(file) if limit == _UNKNOWN else file.read(limit, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise AudioError("truncated", f"{_NOT_TO_ITS_END}: {error.error_string}") from None
            _check_length(len(wave) / file.samplerate, max_seconds)
            _check_whole(file, len(wave), data)
            return wave, file.samplerate
    except soundfile.LibsndfileError:
        for magic, at, container in _BY_FFMPEG:
            if data[at : at + len(magic)] == magic:
                return _read_container(data, container, max_seconds)
        if is_cut_off(data):
            raise AudioError("truncated", _ENDS_TOO_SOON) from None
        # Not libsndfile's words: they hold an address in memory, and threads that fail at once swap them.
        raise AudioError("unreadable", "not a sound file, or of a format that libsndfile does not read") from None


def _opened(source: Path | io.BytesIO) -> "soundfile.SoundFile":
    import soundfile

    file = soundfile.SoundFile(source)
    if file.frames == _UNKNOWN:
        # soundfile seeks after each read, and libsndfile cannot seek to an end that it does not know.
        file.seekable = lambda: False
    return file


_BLOCK_SECONDS = 30


def _mono_blocks(path: Path) -> Iterator[np.ndarray]:
    """A file's sound at 16 kHz, mixed down, a stretch at a time; equal to what `decode` makes of the whole."""
    import soundfile
    import soxr

    if not path.stat().st_size:
        raise AudioError("empty", "the file has no bytes")
    read = 0
    try:
        with _opened(path) as file, path.open("rb") as raw:
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
            while len(block := _next_block(file, read, _BLOCK_SECONDS * file.samplerate)):
                if not np.isfinite(block).all():
                    raise AudioError("not_finite", "the file has NaN or infinite samples")
                read += len(block)
                mono = block.mean(axis=1)
                yield mono if file.samplerate == SAMPLE_RATE else resampler.resample_chunk(mono)
            if file.samplerate != SAMPLE_RATE and read:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check_whole(file, read, data)
            if not read:
                raise AudioError("empty", "the file has no samples")
    except soundfile.LibsndfileError as error:
        if read:
            raise AudioError("truncated", f"{_NOT_TO_ITS_END}, only {read} samples: {error.error_string}") from None
        yield decode(path)


_MP3_LEAD = 16 * 1152
"""Samples (16 frames) that an MP3 decoder needs to be itself again: soundfile seeks after each read."""


def _read_blocks(file: "soundfile.SoundFile") -> np.ndarray:
    """Everything, float32 [samples, channels], of a file that does not say how much that is."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while len(block := _next_block(file, 0, _BLOCK_SECONDS * file.samplerate)):
        blocks.append(block)
    return np.concatenate(blocks)


def _next_block(file: "soundfile.SoundFile", at: int, samples: int) -> np.ndarray:
    """float32 [up to samples, channels] from sample `at` on, where the file stands."""
    lead = min(at, _MP3_LEAD) if file.format == "MP3" else 0
    if lead:
        file.seek(at - lead)
    return file.read(lead + samples, dtype="float32", always_2d=True)[lead:]


def _check_sound(samples: int, peak: float) -> None:
    if samples < MIN_SAMPLES:
        raise AudioError("too_short", f"{samples} samples at 16 kHz; a unit needs {MIN_SAMPLES}")
    if peak < SILENCE:
        raise AudioError("silent", "no sample is above -80 dBFS")


_SLACK = 2400
"""Samples by which an estimated length (MP3 without a table) may miss: two frames."""


def _check_whole(file: "soundfile.SoundFile", read: int, data: bytes | mmap.mmap) -> None:
    """read: samples that there were in the file."""
    promised = 0 if file.frames == _UNKNOWN else file.frames - (_SLACK if file.format == "MP3" else 0)
    if read < promised or is_cut_off(data):
        raise AudioError("truncated", f"{read} samples are there; {_ENDS_TOO_SOON}")


_BY_FFMPEG = ((b"ftyp", 4, "mp4"), (b"\x1a\x45\xdf\xa3", 0, "matroska"))
"""m4a, and webm, in which browsers record: what they begin with, where that stands, and what FFmpeg calls them."""


def _read_container(data: bytes, container: str, max_seconds: float | None) -> tuple[np.ndarray, int]:
    import av

    chunks: list[np.ndarray] = []
    count = 0
    try:
        with av.open(io.BytesIO(data), mode="r", format=container) as opened:
            stream = opened.streams.audio[0]
            rate = stream.codec_context.sample_rate
            planar = av.AudioResampler(format="fltp")
            if not rate:
                raise AudioError("unreadable", "its header gives no sampling rate")
            for frame in opened.decode(stream):
                for piece in planar.resample(frame):
                    chunks.append(piece.to_ndarray().T)
                    count += len(chunks[-1])
                    _check_length(count / rate, max_seconds)
                    if max_seconds is not None:
                        _check_size(count * chunks[-1].shape[1], max_seconds)
    except (av.FFmpegError, IndexError) as error:
        if chunks:
            raise AudioError("truncated", f"{_NOT_TO_ITS_END}: {error}") from None
        if is_cut_off(data):
            raise AudioError("truncated", _ENDS_TOO_SOON) from None
        raise AudioError("unreadable", str(error)) from None
    if is_cut_off(data):
        raise AudioError("truncated", _ENDS_TOO_SOON)
    return (np.concatenate(chunks) if chunks else np.zeros((0, 1), np.float32)), rate


_MOST_SAMPLES = 400_000
"""A second, of the longest sound, all channels together: eight channels at 48 kHz, or two at 192 kHz."""


def _check_size(samples: int, max_seconds: float) -> None:
    """A few bytes of FLAC or Ogg can stand for seconds of 255 channels at 655 kHz: gigabytes once decoded."""
    most = int(max_seconds * _MOST_SAMPLES)
    if samples > most:
        raise AudioError("too_large", f"{samples} samples, all channels together; at most {most} are decoded")


def _check_length(seconds: float, limit: float | None) -> None:
    if limit is not None and seconds > limit:
        raise AudioError("too_long", f"{seconds:.1f} s; at most {limit:g} s are taken")
