"""Clips in pieces: the original's chunks as it made them, and windows without a seam."""

from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import HUBERT, HUBERT_LAYOUTS

from speechgpt.speech import audio, hubert, long_audio
from speechgpt.speech.audio import FRAME, MIN_SAMPLES
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.config import LongAudioSection
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.hubert import HubertFeatures, frame_count
from speechgpt.speech.units import expand, merge


def features(layout: str, normalize: bool, deaf: bool = False) -> HubertFeatures:
    """A random encoder. deaf: without attention, so that a frame depends on what is near it alone."""
    model = hubert.scratch({**HUBERT, **HUBERT_LAYOUTS[layout]}, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for layer in model.encoder.layers if deaf else ():
            layer.attention.out_proj.weight.zero_()
    return HubertFeatures(model, -1, normalize)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """With an offset and a loudness that changes: a stretch of it is not like the whole."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=samples) * np.linspace(0.1, 1.0, samples) + 0.05).astype(np.float32)


def in_pieces(
    encoder: HubertFeatures, wave: np.ndarray, section: LongAudioSection, batch: float = 60.0
) -> torch.Tensor:
    return torch.cat(list(long_audio.frames_of(encoder, wave, section, batch)))


@given(samples=st.integers(MIN_SAMPLES, 200_000), inner=st.integers(1, 300), context=st.integers(0, 100))
def test_windows_keep_every_frame_once_on_its_grid(samples, inner, context):
    place = 0
    for window in long_audio.windows(samples, inner, context):
        assert window.start % FRAME == 0 and 0 <= window.start < window.stop <= samples
        assert window.start // FRAME + window.skipped == place, "frame i is the sound at i x 320 samples"
        assert frame_count(window.stop - window.start) >= window.skipped + window.kept
        after = frame_count(window.stop - window.start) - window.skipped - window.kept
        assert window.skipped == min(context, place)
        assert after == min(context, frame_count(samples) - place - window.kept)
        place += window.kept
    assert place == frame_count(samples)


def test_the_original_s_chunks():
    """SPEC 2.1: 1,600,000 samples make 4999 frames, and a boundary loses one."""
    assert [window.kept for window in long_audio.chunks(3_200_000, 1_600_000)] == [4999, 4999]
    assert frame_count(3_200_000) == 9999
    (one,) = long_audio.chunks(1_600_000, 1_600_000)
    assert one == (0, 1_600_000, 0, 4999)
    # A tail of fewer than 400 samples, at which the original crashes, has no frame.
    assert [window.stop for window in long_audio.chunks(1_600_399, 1_600_000)] == [1_600_000]
    assert [window.kept for window in long_audio.chunks(1_600_400, 1_600_000)] == [4999, 1]
    with pytest.raises(ValueError, match="399 samples has no frame"):
        long_audio.chunks(399, 1_600_000)


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_are_encoded_as_the_original_did(layout, normalize):
    """Normalised over the whole clip, then each chunk through the model by itself, features one after the other."""
    encoder, wave = features(layout, normalize), noise(50_300)
    plain = features(layout, False)
    whole = torch.from_numpy(wave)
    whole = torch.nn.functional.layer_norm(whole, whole.shape) if normalize else whole
    expected = torch.cat(
        [plain([chunk.numpy()])[0] for chunk in (whole[:16000], whole[16000:32000], whole[32000:48000])]
    )
    expected = torch.cat([expected, plain([whole[48000:].numpy()])[0]])
    for batch in (1.0, 60.0):
        found = in_pieces(encoder, wave, LongAudioSection(mode="published", seconds=1), batch)
        assert found.shape == expected.shape == (49 * 3 + 6, 32)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch", [1.0, 60.0])
def test_all_but_attention_is_exact_in_windows(layout, normalize, batch):
    """Convolutions, positions and norms: equal to the whole clip, given a context longer than they reach."""
    encoder, wave = features(layout, normalize, deaf=True), noise(80_123)
    (whole,) = encoder([wave])
    found = in_pieces(encoder, wave, LongAudioSection(seconds=1, context_seconds=0.5), batch)
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-3)
    seam = in_pieces(encoder, wave, LongAudioSection(seconds=1, context_seconds=0), batch)
    assert (seam - whole).abs().max() > 0.05, "without context the seam is heard"


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
def test_windows_that_hear_all_equal_the_whole_clip(layout):
    encoder, wave = features(layout, True), noise(80_123)
    (whole,) = encoder([wave])
    found = in_pieces(encoder, wave, LongAudioSection(seconds=1, context_seconds=10))
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-3)


def test_encoding_a_long_clip_leaves_the_encoder_as_it_was():
    encoder, wave = features("base", True), noise(20_000)
    (before,) = encoder([wave])
    in_pieces(encoder, noise(80_000, 1), LongAudioSection(seconds=1))
    torch.testing.assert_close(encoder([wave])[0], before, atol=0, rtol=0)


def test_long_and_short_clips_together_keep_their_order():
    encoder = features("base", False)
    centroids = Codebook(encoder([noise(48_000)])[0][::7])
    waves = [noise(40_000, 1), noise(9_000, 2), noise(16_000, 3), noise(33_000, 4)]
    section = LongAudioSection(seconds=1, context_seconds=1)
    together = SpeechEncoder(encoder, centroids, long=section).encode(waves)
    for wave, units in zip(waves, together, strict=True):
        (alone,) = SpeechEncoder(encoder, centroids, long=section).encode([wave])
        assert alone.units.tolist() == units.units.tolist()
        assert units.durations.sum() == frame_count(len(wave))
        assert all(left != right for left, right in pairwise(units.units.tolist()))
    (short,) = SpeechEncoder(encoder, centroids).encode([waves[1]])
    assert short.units.tolist() == together[1].units.tolist(), "a clip that fits is encoded whole"


def test_a_memory_mapped_clip_is_not_read_whole(tmp_path):
    """An hour of sound in an encoder that sees ten seconds of it at a time."""
    wave = np.memmap(tmp_path / "hour.f32", np.float32, "w+", shape=(16_000 * 60,))
    wave[:] = noise(len(wave))
    encoder = features("base", True)
    for section in (LongAudioSection(seconds=5, context_seconds=1), LongAudioSection(mode="pauses", seconds=5)):
        mapped, read = (in_pieces(encoder, each, section, 10) for each in (wave, np.array(wave)))
        torch.testing.assert_close(mapped, read)


@pytest.fixture(scope="module")
def shipped() -> SpeechEncoder:
    return SpeechEncoder.load(str(resources.files("speechgpt") / "bundles" / "nano" / "encoder"))


def shares(encoder: SpeechEncoder, wave: np.ndarray, section: LongAudioSection) -> tuple[float, float, int]:
    """Of the units of real speech in pieces, the share equal to the whole clip's: over all, within 0.5 s of a boundary;
    and how many frames are lost."""
    whole = encoder.codebook.assign(encoder._features([wave])[0]).numpy()
    pieces = long_audio.plan(wave, section)
    found = encoder.codebook.assign(in_pieces(encoder._features, wave, section)).numpy()
    firsts = [piece.start // FRAME + piece.skipped for piece in pieces]
    place = np.concatenate([np.arange(first, first + piece.kept) for first, piece in zip(firsts, pieces, strict=True)])
    same = found == whole[place]
    seams = np.abs(place[:, None] - np.array(firsts[1:])).min(axis=1) < 25
    return same.mean(), same[seams].mean(), len(whole) - len(found)


@given(
    sound=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.5]), min_size=1, max_size=60),
    rest=st.integers(0, 3199),
    longest=st.integers(1, 120),
)
def test_pieces_between_pauses_keep_every_frame_once_on_its_grid(sound, rest, longest):
    """sound: loudness of each 0.2 s, some of it silence."""
    draw = np.random.default_rng(len(sound))
    wave = (np.repeat(sound, 3200) * draw.normal(size=3200 * len(sound))).astype(np.float32)[: 3200 * len(sound) - rest]
    if len(wave) < MIN_SAMPLES:
        return
    pieces = long_audio.at_pauses(wave, longest)
    assert pieces == long_audio.at_pauses(wave.copy(), longest)
    place = 0
    for piece in pieces:
        assert (piece.start, piece.skipped) == (place * FRAME, 0), "frame i is the sound at i x 320 samples"
        assert piece.kept == frame_count(piece.stop - piece.start), "no frame of a piece is left out"
        assert piece.kept <= longest and (len(pieces) == 1 or piece.kept >= longest // 2)
        place += piece.kept
    assert place == frame_count(len(wave)) and pieces[-1].stop == len(wave)


def test_cuts_are_where_nobody_speaks():
    wave = noise(16_000 * 20)
    silences = [(5.3, 5.7), (9.0, 9.3), (14.1, 14.8)]
    for first, last in silences:
        wave[int(first * 16_000) : int(last * 16_000)] *= 1e-3
    # 50 Hz hum, louder than the speech, is in no pause and in every one.
    hum = 2 * np.sin(2 * np.pi * 50 * np.arange(len(wave)) / 16_000)
    for heard in (wave, wave + hum.astype(np.float32)):
        cuts = [piece.start / 16_000 for piece in long_audio.at_pauses(heard, 300)][1:]
        assert len(cuts) == len(silences)
        for cut, (first, last) in zip(cuts, silences, strict=True):
            assert first + 0.05 < cut < last - 0.05


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_between_pauses_each_piece_is_a_clip_of_its_own(layout, normalize):
    encoder, wave = features(layout, normalize), noise(80_123)
    section = LongAudioSection(mode="pauses", seconds=1)
    pieces = long_audio.plan(wave, section)
    assert len(pieces) > 5
    alone = torch.cat([encoder([wave[piece.start : piece.stop]])[0] for piece in pieces])
    for batch in (1.0, 60.0):
        torch.testing.assert_close(in_pieces(encoder, wave, section, batch), alone, atol=1e-4, rtol=1e-4)
    book = Codebook(alone[::7])
    (units,) = SpeechEncoder(encoder, book, long=section).encode([wave])
    joined = merge(
        np.concatenate(
            [
                expand(u)
                for u in SpeechEncoder(encoder, book).encode([wave[piece.start : piece.stop] for piece in pieces])
            ]
        )
    )
    assert units.units.tolist() == joined.units.tolist()
    assert units.durations.tolist() == joined.durations.tolist() and units.durations.sum() == frame_count(len(wave))


@pytest.mark.slow
def test_the_seam_of_real_speech_is_gone_in_windows(shipped):
    """Measured: 0.94 in windows and 0.90 in chunks, within 0.5 s of the boundaries 0.94 and 0.62."""
    folder = resources.files("speechgpt").joinpath("recordings")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".opus")), key=lambda file: file.name)
    wave = np.concatenate([audio.decode(file.read_bytes()) for file in files])[: 60 * 16_000]
    everywhere, near, lost = shares(shipped, wave, LongAudioSection(mode="published", seconds=20))
    assert lost == 2
    windowed, inside, kept = shares(shipped, wave, LongAudioSection(seconds=20))
    print(f"chunks: {everywhere:.3f}, near boundaries {near:.3f}; windows: {windowed:.3f}, {inside:.3f}")
    assert kept == 0
    assert inside > 0.9 and inside > near + 0.2
    assert windowed > 0.93 and windowed > everywhere
