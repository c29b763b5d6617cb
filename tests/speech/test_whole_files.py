"""Whole files of every format are taken for whole, whoever wrote them; cut ones are not, wherever the cut is."""

import io
from pathlib import Path

import av
import pytest
import sound_files
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.runtime import sound_header
from speechgpt.speech import audio
from speechgpt.speech.whole_files import is_cut_off

SPEECH = sound_files.speech(3.0)
MORE = {
    "w64": ("W64", "PCM_16"), "au": ("AU", "PCM_16"), "caf": ("CAF", "PCM_16"), "alac": ("CAF", "ALAC_16"),
    "rf64": ("RF64", "PCM_16"), "aifc": ("AIFF", "ULAW"), "nist": ("NIST", "PCM_16"),
}  # fmt: skip
STREAMED = {
    "wav": ("wav", "pcm_s16le"), "aiff": ("aiff", "pcm_s16be"), "au": ("au", "pcm_s16be"), "flac": ("flac", "flac"),
    "opus": ("ogg", "libopus"), "mp3": ("mp3", "libmp3lame"), "m4a": ("mp4", "aac"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sounds")
    made = {name: sound_files.write(folder, name, SPEECH, name).read_bytes() for name in sound_files.FORMATS}
    for name, (container, subtype) in MORE.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, SPEECH, sound_files.RATE, format=container, subtype=subtype)
        made[name] = buffer.getvalue()
    return made


class Pipe:
    """To be written to from first to last, so that no header can be mended afterwards."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def streamed(container: str, codec: str) -> bytes:
    """As FFmpeg writes it into a pipe."""
    pipe = Pipe()
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {}
    with av.open(pipe, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=sound_files.RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(SPEECH[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = sound_files.RATE, 0
        kind = "s16" if codec == "flac" else stream.codec_context.format
        for piece in av.AudioResampler(kind, "mono", sound_files.RATE).resample(frame):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return pipe.data


def heard(data: bytes, folder: Path) -> set[str]:
    """What each way to decode comes to: the seconds, in tenths, or why there are none."""
    (folder / "sound").write_bytes(data)
    ways = (
        lambda: audio.decode(data),
        lambda: audio.decode(data, max_seconds=30),
        lambda: audio.decode_onto_disk(folder / "sound", folder / "wave"),
    )
    found = set()
    for way in ways:
        try:
            found.add(f"{len(way()) / audio.SAMPLE_RATE:.1f}")
        except audio.AudioError as error:
            found.add(error.reason)
    return found


@pytest.mark.parametrize("name", [*sound_files.FORMATS, *MORE])
def test_a_file_is_whole_until_it_is_cut(files: dict[str, bytes], tmp_path: Path, name: str) -> None:
    data = files[name]
    assert heard(data, tmp_path) <= {"3.0", "3.1"} and not is_cut_off(data)
    for kept in (0.1, 0.5, 0.8, 0.95, 0.99):
        found = heard(data[: int(kept * len(data))], tmp_path)
        assert found == {"truncated"}, f"{kept:.0%} of it"
    assert heard(data[:-1], tmp_path) == {"truncated"}


@pytest.mark.parametrize("seconds", [0.1, 0.37, 1.0, 7.77])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus"])
def test_no_length_and_no_rate_looks_like_a_cut(seconds: float, rate: int, format: str) -> None:
    rate = 24_000 if format == "opus" and rate == 44_100 else rate
    assert len(audio.decode(audio.encode(sound_files.speech(seconds), format, rate))) > 0.9 * seconds * 16_000


@pytest.mark.parametrize("name", STREAMED)
def test_a_length_that_a_header_leaves_open_is_no_cut(tmp_path: Path, name: str) -> None:
    data = streamed(*STREAMED[name])
    assert heard(data, tmp_path) <= {"3.0", "3.1"} and not is_cut_off(data)
    header = sound_header.read(io.BytesIO(data))
    assert header is None or header.seconds is None or header.seconds < 4
    if name in ("flac", "opus", "mp3"):
        assert heard(data[: int(0.8 * len(data))], tmp_path) == {"truncated"}, "what it is made of shows it"


def test_of_two_sizes_the_right_one_counts() -> None:
    whole = audio.encode(SPEECH, "wav")
    slip = whole[:40] + (2 * len(whole)).to_bytes(4, "little") + whole[44:]
    other = whole[:4] + (len(whole) + 8).to_bytes(4, "little") + whole[8:]
    assert not is_cut_off(slip) and not is_cut_off(other) and is_cut_off(whole[:-1])
    behind = whole + b"LIST" + (100).to_bytes(4, "little") + b"INFO"
    assert not is_cut_off(behind), "the sound is whole"


@pytest.mark.parametrize("tag", [b"TAG" + bytes(125), b"APETAGEX" + bytes(60), bytes(1000)])
def test_what_follows_the_sound_is_no_part_of_it(files: dict[str, bytes], tag: bytes) -> None:
    for name in ("mp3", "opus", "vorbis", "wav"):
        assert not is_cut_off(files[name] + tag)
    assert not is_cut_off(b"ID3\4\0\0\0\0\1\0" + bytes(128) + files["mp3"])


@given(
    magic=st.sampled_from([b"RIFF", b"RF64", b"FORM", b"riff", b"caff", b".snd", b"NIST_1A", b"OggS", b"ID3", b"\xff"]),
    rest=st.binary(max_size=200),
)
def test_whatever_the_bytes_are_there_is_an_answer(magic: bytes, rest: bytes) -> None:
    assert is_cut_off(magic + rest) in (True, False)
    assert is_cut_off(b"\0\0\0\x08ftyp" + rest) in (True, False)
