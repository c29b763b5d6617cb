import numpy as np
import pytest
import torch
from pydantic import ValidationError

from speechgpt.speech import pitch
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.config import GeneratorSection, VocoderSection, VocoderTrainingSection
from speechgpt.speech.hubert import HubertFeatures, scratch
from speechgpt.speech.units import merge
from speechgpt.speech.vocoder import UnitVocoder, Vocoder
from speechgpt.training.discriminators import Discriminators
from speechgpt.training.pacing import Pace, at_predicted_lengths, moved, moved_pitch
from speechgpt.training.vocoding import (
    Recording,
    VocoderTrainer,
    calibrate_durations,
    collate,
    cut,
    duration_loss,
    likeness_loss,
    log_mel,
    segments,
    train,
    train_durations,
)

SMALL = {
    "embedding_dim": 16,
    "model_in_dim": 16,
    "upsample_initial_channel": 64,
    "istft_channels": 64,
    "istft_blocks": (1, 2),
}
TRAINING = {"batch": 4, "clip_units": 24, "segment_units": 12, "discriminators": "stft", "learning_rate": 2e-3}
CODEBOOK = Codebook(torch.eye(3))


def recordings() -> list[Recording]:
    """A tone for each unit, two frames of it at a time."""
    made = []
    for seed in range(6):
        units = np.repeat(np.random.default_rng(seed).integers(3, size=15), 2)
        phase = np.cumsum(np.repeat(np.array([250.0, 500.0, 1000.0])[units], 320)) / 16_000
        wave = (0.3 * np.sin(2 * np.pi * phase)).astype(np.float32)
        made.append(Recording(wave, np.eye(3, dtype=np.float16)[units], pitch.track(wave, 30)))
    return made


def trainer(steps: int, head: str = "istft", centroid_dimensions: int = 0, **training: object) -> VocoderTrainer:
    torch.manual_seed(0)
    section = VocoderTrainingSection(**{**TRAINING, "steps": steps, **training})
    return VocoderTrainer(
        UnitVocoder(GeneratorSection(**SMALL, head=head), 3, centroid_dimensions), [CODEBOOK], section
    )


@pytest.mark.parametrize(("head", "precision"), [("istft", "fp32"), ("istft", "bf16"), ("hifigan", "fp32")])
def test_spectra_come_nearer_with_training(head: str, precision: str) -> None:
    begun = trainer(80, head, adversarial_from=80, precision=precision)
    losses = list(train(begun, recordings().__getitem__, 6, seed=0))
    assert all(p.dtype == torch.float32 for p in begun.parameters())
    assert np.mean([x["mel"] for x in losses[-5:]]) < 0.75 * np.mean([x["mel"] for x in losses[:5]])
    assert losses[-1]["duration"] < losses[0]["duration"]


def test_the_discriminators_join_at_their_step() -> None:
    losses = list(train(trainer(4, adversarial_from=2), recordings().__getitem__, 6, seed=0))
    assert ["adversarial" in x for x in losses] == [False, False, True, True]


def test_resumed_equals_unbroken() -> None:
    whole, first, second = (trainer(6, adversarial_from=3, centroid_dimensions=3) for _ in range(3))
    unbroken = list(train(whole, recordings().__getitem__, 6, seed=0))
    steps = train(first, recordings().__getitem__, 6, seed=0)
    for _ in range(4):
        next(steps)
    second.restore(first.state())
    resumed = list(train(second, recordings().__getitem__, 6, seed=0, first_step=4))
    assert resumed == unbroken[4:]


def test_published_discriminators_judge_any_length() -> None:
    judged = Discriminators("hifigan")(torch.randn(2, 8960))
    assert len(judged) == 8
    assert [len(features) for _, features in judged] == [5] * 5 + [7] * 3


def test_log_mel_peaks_at_the_tone() -> None:
    wave = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    bands = log_mel(wave, 1024, 256, 80)[0].mean(1)
    assert 20 < int(bands.argmax()) < 32


def test_durations_of_padding_do_not_count() -> None:
    made = trainer(1)
    made.vocoder.eval()
    table = made.table(CODEBOOK)
    short, long = recordings()[0]._replace(frames=recordings()[0].frames[:4]), recordings()[1]
    together = duration_loss(made.vocoder, table, CODEBOOK, [short, long])
    alone = [duration_loss(made.vocoder, table, CODEBOOK, [r]) for r in (short, long)]
    assert min(alone) <= together <= max(alone)


def test_a_cut_keeps_sound_features_and_pitch_together() -> None:
    whole = recordings()[0]._replace(pitch=np.arange(30, dtype=np.float32), strangers=(np.ones((30, 3), np.float16),))
    own = cut(whole, 8, 0.0, np.random.default_rng(3))
    first = int(own.pitch[0])
    assert len(own.frames) == 8 and len(own.wave) == 8 * 320
    np.testing.assert_array_equal(own.wave, whole.wave[first * 320 : (first + 8) * 320])
    np.testing.assert_array_equal(own.frames, whole.frames[first : first + 8])
    assert (cut(whole, 100, 1.0, np.random.default_rng(0)).frames == 1).all()


def test_segments_are_of_one_place_and_lie_inside_their_clips() -> None:
    batch = collate([recordings()[0], cut(recordings()[1], 6, 0.0, np.random.default_rng(0))])
    assert batch.mask.sum(2).flatten().tolist() == [30, 6]
    wanted, heard = segments(batch, batch.waves, 10, np.random.default_rng(0))
    assert wanted.shape == (2, 3200) and torch.equal(wanted, heard)
    assert torch.equal(wanted[1], batch.waves[1, :3200]) and (wanted[1, 6 * 320 :] == 0).all()


def test_the_pitch_is_learned_from_the_units() -> None:
    made = trainer(60, adversarial_from=60)
    losses = list(train(made, recordings().__getitem__, 6, seed=0))
    assert np.mean([x["pitch"] for x in losses[-5:]]) < 0.6 * np.mean([x["pitch"] for x in losses[:5]])


def test_durations_are_brought_to_the_length_of_the_clips() -> None:
    trained = trainer(60, adversarial_from=60)
    list(train(trained, recordings().__getitem__, 6, seed=0))
    vocoder = Vocoder(trained.vocoder)
    trained.vocoder.dur_predictor.proj.bias.data -= 0.3
    merged = [merge(np.argmax(clip.frames, axis=1)) for clip in recordings()]
    wanted = sum(int(m.durations.sum()) for m in merged)

    def made() -> int:
        return sum(int(frames.sum()) for frames in vocoder.durations([m.units.tolist() for m in merged]))

    assert made() < 0.9 * wanted
    calibrate_durations(vocoder, CODEBOOK, recordings())
    assert abs(made() - wanted) < 0.1 * wanted


def listener(normalize: bool = False) -> HubertFeatures:
    architecture = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    front = {"conv_dim": [32, 32, 32], "conv_kernel": [80, 5, 4], "conv_stride": [20, 4, 4]}
    rest = {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "feat_extract_norm": "layer"}
    return HubertFeatures(scratch({**architecture, **front, **rest}, seed=0), -1, normalize)


def test_durations_alone_are_learnt_and_nothing_else_changes() -> None:
    begun = trainer(1, duration_steps=150)
    before = {name: weight.clone() for name, weight in begun.vocoder.state_dict().items()}
    losses = list(train_durations(begun, recordings().__getitem__, 6, seed=0))
    assert len(losses) == 150 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    changed = {name for name, weight in begun.vocoder.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("dur_predictor.") for name in changed)


def test_likeness_is_zero_for_the_clips_themselves_whatever_lies_behind_their_ends() -> None:
    chosen = recordings()[:2]
    batch = collate([chosen[0], cut(chosen[1], 12, 0.0, np.random.default_rng(0))])
    noisy = batch.waves.clone()
    noisy[1, 12 * 320 :] = 1.0
    assert likeness_loss(listener(), noisy, batch).item() < 1e-6
    assert likeness_loss(listener(), batch.waves.flip(1), batch).item() > 0.1


def test_an_encoder_that_normalises_hears_its_clips_normalised() -> None:
    batch = collate([recordings()[0], cut(recordings()[1], 12, 0.0, np.random.default_rng(0))])
    shifted = 0.5 * batch.waves + 0.3
    assert likeness_loss(listener(normalize=True), shifted, batch).item() < 1e-5
    assert likeness_loss(listener(), shifted, batch).item() > 1e-2


def test_likeness_comes_by_training_for_it_and_leaves_the_encoder_as_it_was() -> None:
    reached = {}
    for weight in (0.0, 45.0):
        encoder = listener()
        before = {name: p.clone() for name, p in encoder.model.named_parameters()}
        begun = trainer(40, adversarial_from=40, likeness=weight)
        begun.encoder = encoder
        losses = list(train(begun, recordings().__getitem__, 6, seed=0))
        reached[weight] = np.mean([x["likeness"] for x in losses[-5:]])
        assert all(torch.equal(p, before[name]) for name, p in encoder.model.named_parameters())
        assert not any("encoder" in name for name in begun.state()["model"])
    assert reached[45.0] < 0.9 * reached[0.0]


def test_a_pace_moves_spectra_with_their_units() -> None:
    """Of clips made at other lengths, each unit's spectrum is found where the unit now is."""
    own, other = np.array([8, 2, 2, 3]), np.array([2, 3, 7, 3])
    pitches = np.array([250.0, 1000.0, 500.0, 2000.0])

    def tones(durations: np.ndarray) -> torch.Tensor:
        phase = np.cumsum(np.repeat(pitches, durations * 320)) / 16_000
        return torch.from_numpy(np.sin(2 * np.pi * phase).astype(np.float32))[None]

    codes = torch.from_numpy(np.repeat([0, 1, 0, 2], other))[None]
    pace = Pace(codes, torch.tensor([15]), (np.r_[0.0, other.cumsum()],), (np.r_[0.0, own.cumsum()],))
    found = moved(log_mel(tones(own), 512, 128, 40), 128, pace).argmax(1)[0]
    wanted = log_mel(tones(other), 512, 128, 40).argmax(1)[0]
    assert found.shape == wanted.shape and (found == wanted).float().mean() > 0.85
    assert (log_mel(tones(own), 512, 128, 40).argmax(1)[0] == wanted).float().mean() < 0.7
    same = Pace(codes, pace.lengths, pace.own_ends, pace.own_ends)
    spectra = log_mel(tones(own), 512, 128, 40)
    torch.testing.assert_close(moved(spectra, 128, same), spectra)
    hertz = torch.from_numpy(np.repeat(pitches, own).astype(np.float32))[None]
    assert moved_pitch(hertz, pace)[0].tolist() == np.repeat(pitches, other).tolist()
    assert pace.own_places(np.array([15.0, 18.0])).tolist() == [[15.0, 18.0]], "behind the end, as far behind it"


def test_predicted_paces_keep_units_their_order_and_about_the_length() -> None:
    made = trainer(60, adversarial_from=60)
    list(train(made, recordings().__getitem__, 6, seed=0))
    batch = collate([recordings()[0], cut(recordings()[1], 12, 0.0, np.random.default_rng(0))])
    codes = CODEBOOK.assign(batch.features)
    pace = at_predicted_lengths(made.vocoder, made.table(CODEBOOK).detach(), codes, batch.lengths)
    assert made.vocoder.dur_predictor is not None and made.vocoder.dur_predictor.training
    for row, n, again, m, ends in zip(codes, batch.lengths, pace.codes, pace.lengths, pace.ends, strict=True):
        spoken, before = merge(again[:m].numpy()), merge(row[:n].numpy())
        assert spoken.units.tolist() == before.units.tolist()
        assert np.r_[0, spoken.durations.cumsum()].tolist() == ends.tolist()
        assert abs(int(m) - int(n)) <= 2
    assert pace.mask.sum(2).flatten().tolist() == pace.lengths.tolist()


def test_a_paced_training_learns_the_spectra_too() -> None:
    begun = trainer(80, adversarial_from=60, paced=1.0)
    losses = list(train(begun, recordings().__getitem__, 6, seed=0))
    assert np.mean([x["mel"] for x in losses[-5:]]) < 0.8 * np.mean([x["mel"] for x in losses[:5]])
    assert losses[-1]["features"] == 0


def test_a_vocoder_without_durations_has_no_pace() -> None:
    with pytest.raises(ValidationError, match="training.paced: units are made at predicted lengths"):
        VocoderSection(generator=GeneratorSection(durations=False), training=VocoderTrainingSection(paced=0.5))
