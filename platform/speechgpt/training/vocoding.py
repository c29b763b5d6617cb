"""Training the unit vocoder: spectral, pitch and duration losses on clips, adversarial ones on segments of them.

The losses are those of Polyak et al. (2021) and fairseq.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.audio import FRAME, MIN_SAMPLES, SAMPLE_RATE
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.config import VocoderTrainingSection
from speechgpt.speech.generators import octaves
from speechgpt.speech.hubert import HubertFeatures
from speechgpt.speech.pitch import UNKNOWN
from speechgpt.speech.units import merge
from speechgpt.speech.vocoder import UnitVocoder, Vocoder
from speechgpt.training import pacing
from speechgpt.training.discriminators import Discriminators, adversarial_loss, discriminator_loss, feature_loss
from speechgpt.training.pacing import Pace

_MEL_WEIGHT, _FEATURE_WEIGHT, _PITCH_WEIGHT = 45.0, 2.0, 3.0
_DURATION_CLIPS = 8
"""Whole clips a step for the duration predictor."""
_CLIPS_FOR_DURATIONS_ALONE = 32
_MOST_SHIFT, _HALVINGS = 0.5, 12
"""Of log(duration + 1), either way, and how often the search for it is narrowed."""
_OWN_CODEBOOK = 0.5
"""Share of the steps on the codebook that the vocoder will be served with."""


class Recording(NamedTuple):
    """One training clip."""

    wave: np.ndarray
    """float32 [samples] at 16 kHz, at least 320 a frame."""
    frames: np.ndarray
    """Encoder features [frames, dimensions], so that any codebook can name their units."""
    pitch: np.ndarray
    """Hz [frames]."""
    strangers: tuple[np.ndarray, ...] = ()
    """Features of others who say the same, moved to these frames, each [frames, dimensions]."""
    speaker: int = 0


class Batch(NamedTuple):
    """Clips cut to at most `clip_units` frames, and padded to the longest."""

    waves: Tensor
    """[clips, 320 T]"""
    features: Tensor
    """[clips, T, dimensions]"""
    pitch: Tensor
    """Hz [clips, T]"""
    lengths: Tensor
    """Frames of each clip."""
    speakers: Tensor

    @property
    def mask(self) -> Tensor:
        """[clips, 1, T], 1 inside a clip."""
        return (torch.arange(self.pitch.shape[1]) < self.lengths[:, None])[:, None].float()


class VocoderTrainer(nn.Module):
    """Everything that is trained and saved: generator side and discriminators with their optimisers."""

    def __init__(
        self,
        vocoder: UnitVocoder,
        codebooks: list[Codebook],
        section: VocoderTrainingSection,
        encoder: HubertFeatures | None = None,
    ) -> None:
        """encoder: not frozen; what `likeness` is heard by."""
        super().__init__()
        self.encoder = encoder
        if encoder is not None:
            encoder.model.requires_grad_(False)
        self.vocoder = vocoder.train()
        self.discriminators = Discriminators(section.discriminators)
        self.codebooks = codebooks
        self.section = section
        rate = section.learning_rate
        self.optimizer = torch.optim.AdamW(self.vocoder.parameters(), rate, betas=(0.8, 0.99))
        self.judge_optimizer = torch.optim.AdamW(self.discriminators.parameters(), rate, betas=(0.8, 0.99))

    def table(self, codebook: Codebook) -> Tensor:
        """Unit embeddings for a codebook: a function of its centroids, or the trained table if there is but one."""
        if self.vocoder.from_centroids is None:
            return self.vocoder.dict.weight
        return self.vocoder.from_centroids(codebook.centroids)

    def state(self) -> dict:
        """Tensors and numbers only, for a checkpoint."""
        return {
            "model": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judge_optimizer": self.judge_optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        self.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.judge_optimizer.load_state_dict(state["judge_optimizer"])


def train(
    trainer: VocoderTrainer,
    recording: Callable[[int], Recording],
    count: int,
    *,
    seed: int,
    first_step: int = 0,
    synchronise: Callable[[nn.Module], None] = lambda module: None,
) -> Iterator[dict[str, float]]:
    """Optimiser steps from `first_step` on, over `count` recordings; yields the losses of each.

    synchronise: averages a module's gradients over the workers.
    """
    section = trainer.section
    for step in range(first_step, section.steps):
        draw = np.random.default_rng((seed, step))
        torch.manual_seed(
            int(draw.integers(2**62))
        )  # dropout, too, is a function of seed and step: a resumed run equals an unbroken one
        others = int(draw.integers(len(trainer.codebooks)))
        codebook = trainer.codebooks[0 if draw.random() < _OWN_CODEBOOK else others]
        for optimizer in (trainer.optimizer, trainer.judge_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, section)
        yield {"step": step + 1, **_step(trainer, codebook, recording, count, draw, step, synchronise)}


def _step(
    trainer: VocoderTrainer,
    codebook: Codebook,
    recording: Callable[[int], Recording],
    count: int,
    draw: np.random.Generator,
    step: int,
    synchronise: Callable[[nn.Module], None],
) -> dict[str, float]:
    section, vocoder, judges = trainer.section, trainer.vocoder, trainer.discriminators
    chosen = [recording(int(draw.integers(count))) for _ in range(section.batch)]
    batch = collate([cut(each, section.clip_units, section.strangers, draw) for each in chosen])
    table = trainer.table(codebook)
    codes, mask, pitch, lengths, pace = codebook.assign(batch.features), batch.mask, batch.pitch, batch.lengths, None
    if draw.random() < section.paced:
        pace = pacing.at_predicted_lengths(vocoder, table.detach(), codes, lengths)
        codes, mask, pitch, lengths = pace.codes, pace.mask, pacing.moved_pitch(pitch, pace), pace.lengths
    with torch.autocast("cpu", torch.bfloat16, enabled=section.precision == "bf16"):
        made = vocoder(table[codes], mask, batch.speakers, pitch)
    spectral = mel_loss(made.samples, batch.waves, section.mel_resolutions, pace)
    durations = duration_loss(
        vocoder, table, codebook, [recording(int(draw.integers(count))) for _ in range(_DURATION_CLIPS)]
    )
    loss = _MEL_WEIGHT * spectral + durations
    losses = {"mel": spectral.item(), "duration": durations.item()}
    if made.octaves is not None:
        expected = ((made.octaves - octaves(pitch)).abs() * mask[:, 0]).sum() / lengths.sum()
        loss = loss + _PITCH_WEIGHT * expected
        losses["pitch"] = expected.item()
    if trainer.encoder is not None and pace is None:
        with torch.autocast("cpu", torch.bfloat16, enabled=section.precision == "bf16"):
            alike = likeness_loss(trainer.encoder, made.samples, batch)
        loss = loss + section.likeness * alike
        losses["likeness"] = alike.item()
    if step >= section.adversarial_from:
        wanted, heard = segments(batch, made.samples, section.segment_units, draw, pace)
        judged = discriminator_loss(judges(wanted), judges(heard.detach()))
        trainer.judge_optimizer.zero_grad()
        judged.backward()
        synchronise(judges)
        nn.utils.clip_grad_norm_(judges.parameters(), 10.0)
        trainer.judge_optimizer.step()
        judges.requires_grad_(False)
        real, fake = judges(wanted), judges(heard)
        # Another pace puts what is compared a frame apart.
        adversarial, features = adversarial_loss(fake), feature_loss(real, fake) if pace is None else torch.zeros(())
        loss = loss + adversarial + _FEATURE_WEIGHT * features
        losses |= {"discriminator": judged.item(), "adversarial": adversarial.item(), "features": features.item()}
    trainer.optimizer.zero_grad()
    loss.backward()
    judges.requires_grad_(True)
    synchronise(vocoder)
    nn.utils.clip_grad_norm_(vocoder.parameters(), 100.0)
    trainer.optimizer.step()
    return losses


def train_durations(
    trainer: VocoderTrainer, recording: Callable[[int], Recording], count: int, seed: int
) -> Iterator[float]:
    """`duration_steps` steps of the duration predictor alone, on the codebook that is served; yields the losses."""
    vocoder, steps = trainer.vocoder, trainer.section.duration_steps
    if vocoder.dur_predictor is None:
        return
    optimizer = torch.optim.AdamW(vocoder.dur_predictor.parameters(), trainer.section.learning_rate)
    table = trainer.table(trainer.codebooks[0]).detach()
    for step in range(steps):
        draw = np.random.default_rng((seed, step))
        torch.manual_seed(int(draw.integers(2**62)))
        for group in optimizer.param_groups:
            group["lr"] = trainer.section.learning_rate * (1 - step / steps)
        clips = [recording(int(draw.integers(count))) for _ in range(_CLIPS_FOR_DURATIONS_ALONE)]
        loss = duration_loss(vocoder, table, trainer.codebooks[0], clips)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def learning_rate(step: int, section: VocoderTrainingSection) -> float:
    """Warm-up over 50 steps, hold to half of the training, then linear to a fiftieth."""
    done = step / section.steps
    return section.learning_rate * min(1.0, (step + 1) / 50, max(0.02, 2 * (1 - done)))


def mel_loss(
    made: Tensor, wanted: Tensor, resolutions: tuple[tuple[int, int, int], ...], pace: Pace | None = None
) -> Tensor:
    """Mean absolute difference of log-mel spectra, averaged over resolutions. made, wanted: [clips, samples].

    pace: of `made`, where it is not that of `wanted`.
    """

    def difference(window: int, hop: int, bands: int) -> Tensor:
        spectra = log_mel(wanted, window, hop, bands)
        return F.l1_loss(
            log_mel(made, window, hop, bands), spectra if pace is None else pacing.moved(spectra, hop, pace)
        )

    return torch.stack([difference(*resolution) for resolution in resolutions]).mean()


def log_mel(wave: Tensor, window: int, hop: int, bands: int) -> Tensor:
    """log(clamp(mel · sqrt(|STFT|² + 1e-9), 1e-5)), reflect-padded by (window - hop) / 2. [clips, bands, frames]."""
    padded = F.pad(wave[:, None], ((window - hop) // 2,) * 2, mode="reflect")[:, 0]
    spectrum = torch.stft(padded, window, hop, window=_hann(window), center=False, return_complex=True)
    magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
    return torch.log(torch.clamp(_mel_filters(window, bands) @ magnitude, min=1e-5))


def likeness_loss(encoder: HubertFeatures, made: Tensor, batch: Batch) -> Tensor:
    """Mean absolute difference of the encoder's features of the clips and of what was made of them.

    A spectral loss weighs what is loud; this one weighs what tells one unit from another. In standard deviations of the
    features. made: [clips, samples].
    """
    with torch.no_grad():
        wanted = _encoded(encoder, batch.waves, batch.lengths)
    heard = _encoded(encoder, made, batch.lengths)
    mask = batch.mask[:, 0, : wanted.shape[1], None]
    return ((heard - wanted).abs() * mask).sum() / (mask.sum() * wanted.shape[2]) / wanted.std()


def _encoded(encoder: HubertFeatures, waves: Tensor, frames: Tensor) -> Tensor:
    """Features of clips of so many frames, whatever lies behind their ends. waves: [clips, samples]."""
    inside = torch.arange(waves.shape[1]) < FRAME * frames[:, None]
    waves = waves * inside
    if encoder.normalize:
        count = inside.sum(1, keepdim=True)
        centred = (waves - waves.sum(1, keepdim=True) / count) * inside
        waves = centred * (centred.square().sum(1, keepdim=True) / count + 1e-5).rsqrt()
    # The last frame looks 80 samples beyond its 320.
    lengths = (FRAME * frames + MIN_SAMPLES - FRAME).tolist()
    return encoder.forward(F.pad(waves, (0, max(lengths) - waves.shape[1])), lengths).float()


def duration_loss(vocoder: UnitVocoder, table: Tensor, codebook: Codebook, recordings: list[Recording]) -> Tensor:
    """MSE(ŷ, log(duration + 1)) over the merged units of whole clips; 0 for a vocoder without durations."""
    if vocoder.dur_predictor is None:
        return torch.zeros(())
    merged = [merge(codebook.assign(torch.from_numpy(r.frames.astype(np.float32))).numpy()) for r in recordings]
    units, lengths = pacing.padded(merged)
    mask = (lengths > 0).float()
    predicted = vocoder.dur_predictor(table[units], mask)
    return ((predicted - torch.log(lengths.float() + 1)).square() * mask).sum() / mask.sum()


@torch.no_grad()
def calibrate_durations(vocoder: Vocoder, codebook: Codebook, recordings: Iterable[Recording]) -> None:
    """Shift the predicted durations so that these clips come out as long as they were.

    What training finds is the mean of log(duration + 1), and its exponent is less than the mean duration.
    """
    if vocoder.model.dur_predictor is None:
        return
    merged = [merge(codebook.assign(torch.from_numpy(r.frames.astype(np.float32))).numpy()) for r in recordings]
    wanted = sum(int(m.durations.sum()) for m in merged)
    bias = vocoder.model.dur_predictor.proj.bias
    trained, low, high = bias.clone(), -_MOST_SHIFT, _MOST_SHIFT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        bias.copy_(trained + middle)
        made = sum(int(durations.sum()) for durations in vocoder.durations([m.units.tolist() for m in merged]))
        low, high = (middle, high) if made < wanted else (low, middle)


def cut(recording: Recording, longest: int, strangers: float, draw: np.random.Generator) -> Recording:
    """A random stretch of at most `longest` frames; with probability `strangers` as somebody else says it."""
    frames = recording.frames
    if recording.strangers and draw.random() < strangers:
        frames = recording.strangers[int(draw.integers(len(recording.strangers)))]
    usable = min(len(frames), len(recording.wave) // FRAME)
    first = int(draw.integers(max(0, usable - longest) + 1))
    last = first + min(usable, longest)
    wave = recording.wave[first * FRAME : last * FRAME]
    return Recording(wave, frames[first:last], recording.pitch[first:last], (), recording.speaker)


def collate(recordings: list[Recording]) -> Batch:
    """Recordings of one frame for every 320 samples, padded."""
    longest = max(len(r.frames) for r in recordings)

    def padded(x: np.ndarray, size: int, value: float = 0.0) -> np.ndarray:
        width = ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1)
        return np.pad(x.astype(np.float32), width, constant_values=value)

    return Batch(
        torch.from_numpy(np.stack([padded(r.wave, longest * FRAME) for r in recordings])),
        torch.from_numpy(np.stack([padded(r.frames, longest) for r in recordings])),
        torch.from_numpy(np.stack([padded(r.pitch, longest, UNKNOWN) for r in recordings])),
        torch.tensor([len(r.frames) for r in recordings]),
        torch.tensor([r.speaker for r in recordings]),
    )


def segments(
    batch: Batch, made: Tensor, frames: int, draw: np.random.Generator, pace: Pace | None = None
) -> tuple[Tensor, Tensor]:
    """A random stretch of `frames` of each clip, as it was and as it was made; short clips end in silence.

    The same one, or where the clips are made at another pace, what begins at the same place of the speech.
    """
    lengths = batch.lengths if pace is None else pace.lengths
    starts = [int(draw.integers(max(0, int(n) - frames) + 1)) for n in lengths]
    own = starts if pace is None else pace.own_places(np.array(starts, float)).diagonal().astype(int).tolist()
    return _cut_out(batch.waves, own, frames), _cut_out(made, starts, frames)


def _cut_out(waves: Tensor, starts: list[int], frames: int) -> Tensor:
    """[clips, samples], and the frame at which each clip's stretch begins -> [clips, 320 frames]"""
    behind = F.pad(waves, (0, frames * FRAME))
    return torch.stack([behind[i, at * FRAME : (at + frames) * FRAME] for i, at in enumerate(starts)])


@functools.cache
def _hann(window: int) -> Tensor:
    return torch.hann_window(window)


@functools.cache
def _mel_filters(window: int, bands: int) -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        window // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(filters.T.astype(np.float32))
