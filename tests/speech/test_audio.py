import io

import av
import numpy as np
import pytest
import soundfile

from speechgpt.speech import audio


def tone(seconds: float = 1.0, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def m4a(samples: np.ndarray, rate: int) -> bytes:
    return contained(samples, rate, "mp4", "aac", "fltp")


def webm(samples: np.ndarray, rate: int = 48_000, *, live: bool = False) -> bytes:
    """live: as a browser records, which does not know how long it will be."""
    return contained((samples * 32767).astype(np.int16), rate, "webm", "libopus", "s16", live="1" if live else "0")


def contained(samples: np.ndarray, rate: int, format: str, codec: str, sample: str, **options: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format=sample, layout="mono")
        frame.rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


def loudest_hertz(wave: np.ndarray) -> float:
    return float(np.fft.rfftfreq(len(wave), 1 / 16_000)[np.abs(np.fft.rfft(wave)).argmax()])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_16_khz_at_the_same_pitch(rate: int) -> None:
    wave = audio.decode(wav(tone(1.0, rate), rate))
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) <= 1
    assert abs(loudest_hertz(wave) - 440) < 2


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_mixed_not_joined_in_time(channels: int) -> None:
    stereo = np.zeros((16_000, channels), np.float32)
    stereo[:, 0] = tone()
    wave = audio.decode(wav(stereo, 16_000))
    assert len(wave) == 16_000
    np.testing.assert_allclose(wave, tone() / channels, atol=1e-6)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus"])
def test_what_is_encoded_decodes_to_the_same_sound(format: str) -> None:
    wave = audio.decode(audio.encode(tone(), format))
    assert abs(len(wave) - 16_000) < 1200
    assert abs(loudest_hertz(wave) - 440) < 3


def test_m4a_is_read_though_libsndfile_does_not_know_it() -> None:
    sound = m4a(tone(1.0, 44_100), 44_100)
    assert abs(loudest_hertz(audio.decode(sound, max_seconds=1.1)) - 440) < 3
    with pytest.raises(audio.AudioError, match="too_long"):
        audio.decode(sound, max_seconds=0.9)


@pytest.mark.parametrize("live", [False, True])
def test_what_a_browser_records_is_read(live: bool) -> None:
    sound = webm(tone(1.0, 48_000), live=live)
    wave = audio.decode(sound, max_seconds=1.1)
    assert abs(loudest_hertz(wave) - 440) < 3 and abs(len(wave) - 16_000) < 500
    with pytest.raises(audio.AudioError, match="too_long"):
        audio.decode(sound, max_seconds=0.9)
    for end in (5, 30, 200):
        with pytest.raises(audio.AudioError):
            audio.decode(sound[:end])
    if not live:
        with pytest.raises(audio.AudioError, match="truncated"):
            audio.decode(sound[: len(sound) // 2])


def test_pcm16_at_24_khz_is_headerless_little_endian() -> None:
    data = audio.encode(tone(), "pcm16", 24_000)
    samples = np.frombuffer(data, "<i2")
    assert len(samples) == 24_000
    assert abs(np.abs(samples).max() - 0.3 * 32767) < 200


BAD = {
    "empty": b"",
    "unreadable": b"this is a text file that somebody renamed to wav\n" * 20,
    "too_short": wav(tone()[:1], 16_000),
    "not_finite": wav(np.r_[tone(), np.nan].astype(np.float32), 16_000),
    "silent": wav(np.zeros(16_000, np.float32), 16_000),
    "too_long": wav(tone(3.0), 16_000),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_audio_is_refused_with_its_reason(reason: str) -> None:
    with pytest.raises(audio.AudioError) as caught:
        audio.decode(BAD[reason], max_seconds=2.0)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_a_file_without_samples_is_empty() -> None:
    with pytest.raises(audio.AudioError, match="empty"):
        audio.decode(wav(np.zeros(0, np.float32), 16_000))


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus"])
def test_a_file_cut_in_half_is_refused_not_taken_for_whole(format: str) -> None:
    whole = audio.encode(tone(4.0), format)
    with pytest.raises(audio.AudioError) as caught:
        audio.decode(whole[: len(whole) // 2])
    assert caught.value.reason in ("truncated", "unreadable")


@pytest.mark.parametrize(("channels", "rate", "is_taken"), [(8, 48_000, True), (2, 192_000, True), (8, 192_000, False)])
def test_a_few_bytes_that_stand_for_much_are_refused_before_they_are_decoded(channels, rate, is_taken, monkeypatch):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((rate, channels), np.float32), rate, format="FLAC")
    if not is_taken:
        monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(audio.AudioError) as caught:
        audio.decode(buffer.getvalue(), max_seconds=1.0)
    assert caught.value.reason == ("silent" if is_taken else "too_large")


def test_a_length_that_lies_in_the_header_does_not_escape_the_limit() -> None:
    data = bytearray(wav(tone(5.0), 16_000, "PCM_16"))
    data[40:44] = (32_000).to_bytes(4, "little")
    assert len(audio.decode(bytes(data), max_seconds=2.0)) <= 32_000


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="aiff"):
        audio.encode(tone(), "aiff")


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "opus", "m4a"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_file_decoded_onto_disk_is_the_file_decoded_at_once(tmp_path, format: str, rate: int, monkeypatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK_SECONDS", 1)
    sound = np.random.default_rng(0).normal(size=int(3.3 * rate)).astype(np.float32) * 0.2
    if format == "m4a":
        data = m4a(sound, rate)
    else:
        stereo = np.stack([sound, np.zeros_like(sound)], axis=1)
        data = wav(stereo, rate) if format == "wav" else audio.encode(tone(3.3), format)
    file = tmp_path / f"a.{format}"
    file.write_bytes(data)
    found = audio.decode_onto_disk(file, tmp_path / "a.f32")
    np.testing.assert_allclose(found, audio.decode(data), atol=1e-5)
    assert found.dtype == np.float32 and not found.flags.writeable


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (wav(tone(1.0)[:0], 16_000), "empty"),
        (wav(tone(1.0)[:300], 16_000), "too_short"),
        (wav(np.zeros(16_000, np.float32), 16_000), "silent"),
        (wav(tone(3.0), 16_000)[:60_000], "truncated"),
        (b"a letter, not a recording", "unreadable"),
    ],
)
def test_bad_files_are_refused_on_the_way_to_disk_as_they_are_otherwise(tmp_path, content: bytes, reason: str) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(content)
    for decode in (audio.decode, lambda path: audio.decode_onto_disk(path, tmp_path / "a.f32")):
        with pytest.raises(audio.AudioError) as error:
            decode(file)
        assert error.value.reason == reason
