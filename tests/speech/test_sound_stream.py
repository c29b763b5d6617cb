import io

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from speechgpt.speech.audio import decode, encode
from speechgpt.speech.sound_stream import SoundStream


def spoken(seconds: float) -> np.ndarray:
    time = np.arange(int(seconds * 16_000)) / 16_000
    return (0.6 * np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32)


def streamed(wave: np.ndarray, format: str, rate: int, sizes: list[int]) -> bytes:
    sound, data, start, turn = SoundStream(format, rate), b"", 0, 0
    while start < len(wave):
        size = sizes[turn % len(sizes)]
        data += sound.push(wave[start : start + size])
        start, turn = start + size, turn + 1
    return data + sound.finish()


@pytest.mark.parametrize("rate", [16_000, 24_000])
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5), samples=st.integers(0, 20_000))
def test_pieces_of_pcm_join_to_the_whole(rate: int, sizes: list[int], samples: int) -> None:
    wave = spoken(2)[:samples]
    sizes = [max(size, samples // 50) for size in sizes]
    whole = np.frombuffer(encode(wave, "pcm", rate), "<i2").astype(int)
    pieces = np.frombuffer(streamed(wave, "pcm", rate, sizes), "<i2").astype(int)
    assert len(pieces) == len(whole)
    assert np.abs(pieces - whole).max(initial=0) <= (rate != 16_000)


@pytest.mark.parametrize("format", ["mp3", "opus"])
def test_compressed_pieces_join_to_a_file(format: str) -> None:
    wave = spoken(3)
    data = streamed(wave, format, 16_000, [1000, 5000, 12_000])
    assert soundfile.info(io.BytesIO(data)).channels == 1
    heard = decode(data)
    late = 1105 if format == "mp3" else 0
    assert late <= len(heard) - len(wave) <= late + 1152
    assert np.abs(heard[late : late + len(wave)] - wave).max() < 0.1


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_pieces_in_aac_are_the_sound(rate: int) -> None:
    wave = spoken(3)
    with av.open(io.BytesIO(streamed(wave, "aac", rate, [1000, 5000, 12_000]))) as opened:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in opened.decode(audio=0)])
    # The encoder begins with a frame of silence, and fills its last one.
    late, wanted = 1024, soxr.resample(wave, 16_000, rate)
    assert 0 <= len(heard) - late - len(wanted) < 1024
    assert np.linalg.norm(heard[late : late + len(wanted)] - wanted) < 0.1 * np.linalg.norm(wanted)


def test_sound_comes_before_the_end() -> None:
    for format in ("pcm", "mp3", "opus", "aac"):
        assert len(SoundStream(format, 24_000).push(spoken(2))) > 0


def test_a_format_with_its_length_in_the_header_is_refused() -> None:
    with pytest.raises(ValueError, match="'wav' cannot be streamed"):
        SoundStream("wav")
