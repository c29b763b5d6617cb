"""What a sound file's header says of it, without decoding the sound."""

from typing import IO, NamedTuple


class Header(NamedTuple):
    """seconds: as the header claims, None where it leaves that open. rate: Hz."""

    seconds: float | None
    rate: int


def read(file: IO[bytes]) -> Header | None:
    """None if neither libsndfile nor, for MP4, FFmpeg finds one; `tokenize` decodes and decides."""
    import soundfile

    try:
        found = soundfile.info(file)
    except soundfile.LibsndfileError:
        return _of_mp4(file)
    # What libsndfile says of FLAC that was streamed into a file.
    is_open = found.frames == 2**63 - 1
    return Header(None if is_open else float(found.duration), int(found.samplerate))


def _of_mp4(file: IO[bytes]) -> Header | None:
    import av

    file.seek(0)
    if b"ftyp" not in file.read(16):
        return None
    file.seek(0)
    try:
        with av.open(file, mode="r", format="mp4") as container:
            stream = container.streams.audio[0]
            if stream.duration is None or stream.time_base is None:
                return None
            return Header(float(stream.duration * stream.time_base), stream.codec_context.sample_rate)
    except (av.FFmpegError, IndexError):
        return None
