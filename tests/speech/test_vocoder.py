from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.durations import Rounding
from speechgpt.speech.packed_products import multiplies_bfloat16
from speechgpt.speech.units import merge
from speechgpt.speech.vocoder import UnitVocoder, Vocoder, VocoderError

SMALL = {"embedding_dim": 16, "upsample_initial_channel": 64, "istft_channels": 32, "istft_blocks": (2, 2)}
SECTIONS = {
    "hifigan": GeneratorSection(**SMALL, model_in_dim=16),
    "istft": GeneratorSection(**SMALL, model_in_dim=16, head="istft"),
    "hifigan, speakers": GeneratorSection(**SMALL, model_in_dim=32, speakers=3),
    "istft, speakers": GeneratorSection(**SMALL, model_in_dim=32, speakers=3, head="istft"),
}


Make = Callable[..., Vocoder]


def sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [merge(draw.integers(50, size=n)).units.tolist() for n in (40, 1, 23, 7)]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_batch_sounds_like_its_clips_alone(random_vocoder: Make, name: str) -> None:
    made = random_vocoder(SECTIONS[name])
    speaker = 2 if SECTIONS[name].speakers else None
    for together, units in zip(made.synthesize(sequences(), speaker), sequences(), strict=True):
        alone = made.synthesize([units], speaker)[0]
        assert np.abs(alone).max() > 1e-3
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_batch_with_given_durations_sounds_like_its_clips_alone(random_vocoder: Make, name: str) -> None:
    made = random_vocoder(SECTIONS[name])
    speaker = 1 if SECTIONS[name].speakers else None
    draw = np.random.default_rng(4)
    durations = [draw.integers(0, 6, size=len(units)).tolist() for units in sequences()]
    together = made.synthesize(sequences(), speaker, durations)
    for sound, units, frames in zip(together, sequences(), durations, strict=True):
        assert len(sound) == 320 * sum(frames)
        np.testing.assert_allclose(sound, made.synthesize([units], speaker, [frames])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hifigan, speakers", "istft, speakers"])
def test_speakers_sound_different_and_one_that_is_not_there_is_refused(random_vocoder: Make, name: str) -> None:
    made = random_vocoder(SECTIONS[name])
    one, other = (made.synthesize([[1, 2, 3]], speaker)[0] for speaker in (0, 2))
    assert np.abs(one - other).max() > 1e-3
    with pytest.raises(VocoderError, match="speaker 3"):
        made.synthesize([[1]], speaker=3)


def test_without_a_duration_predictor_a_unit_is_a_frame(random_vocoder: Make) -> None:
    made = random_vocoder(GeneratorSection(**SMALL, model_in_dim=16, durations=False))
    assert not any(name.startswith("dur_predictor") for name in made.model.state_dict())
    sound = made.synthesize([[5, 5, 5, 9]])[0]
    assert len(sound) == 4 * 320
    np.testing.assert_array_equal(sound, made.synthesize([[5, 9]], durations=[[3, 1]])[0])
    with pytest.raises(VocoderError, match="does not predict durations; give them"):
        made.durations([[1, 2]])


@pytest.mark.parametrize("name", SECTIONS)
def test_length_is_320_samples_a_frame(random_vocoder: Make, name: str) -> None:
    made = random_vocoder(SECTIONS[name])
    durations = [[3] * len(units) for units in sequences()]
    for sound, units in zip(made.synthesize(sequences(), durations=durations), sequences(), strict=True):
        assert len(sound) == 320 * 3 * len(units)
    predicted = made.durations(sequences())
    assert all((d >= 1).all() for d in predicted)
    assert [len(s) for s in made.synthesize(sequences())] == [320 * int(d.sum()) for d in predicted]


def test_saved_and_loaded_it_sounds_the_same(random_vocoder: Make, tmp_path: Path) -> None:
    made = random_vocoder(SECTIONS["hifigan"])
    before = made.synthesize(sequences())
    made.save(tmp_path)
    loaded = Vocoder.load(tmp_path)
    assert not any("parametrizations" in name for name in loaded.model.state_dict())
    for a, b in zip(before, loaded.synthesize(sequences()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_fitted_to_another_codebook_it_speaks_its_units(random_vocoder: Make) -> None:
    made = random_vocoder(SECTIONS["istft"], centroid_dimensions=12)
    centroids = torch.randn(80, 12)
    made.fit_codebook(centroids)
    assert made.units == 80
    whole = made.synthesize([[79, 3, 60]])[0]
    # The same centroids in another order are the same sounds under other names.
    made.fit_codebook(centroids.flip(0))
    np.testing.assert_allclose(made.synthesize([[0, 76, 19]])[0], whole, atol=1e-6)


def test_one_that_was_trained_for_one_codebook_says_so(random_vocoder: Make) -> None:
    with pytest.raises(VocoderError, match="cannot be fitted"):
        random_vocoder(SECTIONS["hifigan"]).fit_codebook(torch.randn(5, 12))


def test_a_unit_outside_the_codebook_is_refused(random_vocoder: Make) -> None:
    with pytest.raises(VocoderError, match="unit 50 is outside the vocoder's 50 units"):
        random_vocoder(SECTIONS["hifigan"]).synthesize([[1, 50]])
    with pytest.raises(VocoderError, match="unit -1 is outside"):
        random_vocoder(SECTIONS["hifigan"]).synthesize([[-1, 5]])


def test_durations_of_another_number_than_the_units_are_refused(random_vocoder: Make) -> None:
    with pytest.raises(VocoderError, match="2 units came with 3 durations"):
        random_vocoder(SECTIONS["hifigan"]).synthesize([[1, 5]], durations=[[1, 2, 3]])


def test_no_units_are_no_sound(random_vocoder: Make) -> None:
    made = random_vocoder(SECTIONS["hifigan"])
    assert [len(s) for s in made.synthesize([[], [4], []])] == [0, 320 * int(made.durations([[4]])[0][0]), 0]


def test_a_damaged_directory_is_named(random_vocoder: Make, tmp_path: Path) -> None:
    made = random_vocoder(SECTIONS["hifigan"])
    made.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(VocoderError, match="not a vocoder"):
        Vocoder.load(tmp_path)


def test_the_published_size() -> None:
    """13.38 M parameters with K = 1000 and the weight norm folded (SPEC 4.4)."""
    model = UnitVocoder(GeneratorSection(), 1000)
    from speechgpt.speech.vocoder import fold_weight_norm

    fold_weight_norm(model)
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("dur_predictor"))
    assert round(count / 1e6, 2) == 13.38


@pytest.mark.parametrize("name", SECTIONS)
def test_a_padded_pass_through_the_model_equals_the_clips_alone(random_vocoder: Make, name: str) -> None:
    """As a GPU synthesises a batch; a CPU's HiFi-GAN takes a clip at a time, by other kernels."""
    made = random_vocoder(SECTIONS[name])
    draw = np.random.default_rng(6)
    clips = [torch.from_numpy(draw.integers(50, size=n)) for n in (30, 17, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = (torch.arange(30) < torch.tensor([[30], [17], [4]]))[:, None].float()
    speaker = 1 if SECTIONS[name].speakers else None
    with torch.inference_mode():
        together = made.model(made.embedded(padded), mask, None if speaker is None else torch.full((3,), speaker))
    for sound, clip in zip(together.samples, clips, strict=True):
        alone = made.synthesize([clip.tolist()], speaker, [[1] * len(clip)])[0]
        np.testing.assert_allclose(sound[: len(alone)], alone, rtol=0, atol=1e-5)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no bfloat16 convolutions")
def test_bfloat16_is_asked_for_and_sounds_nearly_the_same(random_vocoder: Make) -> None:
    exact = random_vocoder(SECTIONS["hifigan"])
    rough = Vocoder(exact.model, "bfloat16")
    for sound, wanted in zip(rough.synthesize(sequences()), exact.synthesize(sequences()), strict=True):
        assert sound.shape == wanted.shape
        assert sound.dtype == np.float32
        assert 0 < np.abs(sound - wanted).max() < 0.1
        assert np.std(sound - wanted) < 0.05 * np.std(wanted)


def test_bfloat16_is_refused_where_it_cannot_be_had(random_vocoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VocoderError, match="bfloat16: only a HiFi-GAN on a CPU"):
        Vocoder(random_vocoder(SECTIONS["istft"]).model, "bfloat16")
    monkeypatch.setattr("speechgpt.speech.vocoder.multiplies_bfloat16", lambda: False)
    with pytest.raises(VocoderError, match="bfloat16: this processor has no instructions"):
        Vocoder(random_vocoder(SECTIONS["hifigan"]).model, "bfloat16")


def test_weights_that_change_are_heard(random_vocoder: Make) -> None:
    for name in ("hifigan", "istft"):
        made = random_vocoder(SECTIONS[name])
        before = made.synthesize([[1, 2, 3]], durations=[[4, 4, 4]])[0]
        with torch.no_grad():
            for parameter in made.model.generator.parameters():
                parameter.mul_(0.9)
        assert np.abs(made.synthesize([[1, 2, 3]], durations=[[4, 4, 4]])[0] - before).max() > 1e-3


def test_running_durations_keep_the_pace_and_come_in_pieces_as_at_once():
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = torch.from_numpy(draw.gamma(1.5, 1.2, int(draw.integers(1, 80))))
        predicted = torch.log(lengths + 1)
        frames = Rounding(running=True).push(predicted)
        assert frames.dtype == torch.int64 and len(frames) == len(lengths) and frames.min() >= 1
        ends, exact = frames.cumsum(0), lengths.cumsum(0)
        # Behind only where units of less than a frame had to get one; otherwise within half a frame.
        assert ((ends - exact) >= -0.5 - 1e-9).all()
        free = ends - torch.cat([ends.new_zeros(1), ends[:-1]]) > 1
        assert ((ends - exact)[free] <= 0.5 + 1e-9).all()
        pieces, whole = Rounding(running=True), []
        for piece in predicted.split(int(draw.integers(1, 9))):
            whole.append(pieces.push(piece))
        assert torch.equal(torch.cat(whole), frames)
    each = Rounding(running=False).push(torch.log(torch.tensor([0.2, 1.4, 1.6, 3.5]) + 1))
    assert each.tolist() == [1, 1, 2, 4]
