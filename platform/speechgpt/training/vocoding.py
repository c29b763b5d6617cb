"""Training the unit vocoder: spectral and adversarial losses on random segments, durations on whole clips.

The losses are those of Polyak et al. (2021) and fairseq.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.config import VocoderTrainingSection
from speechgpt.speech.units import merge
from speechgpt.speech.vocoder import UnitVocoder
from speechgpt.training.discriminators import Discriminators, adversarial_loss, discriminator_loss, feature_loss

_MEL_WEIGHT, _FEATURE_WEIGHT = 45.0, 2.0
_DURATION_CLIPS = 8
"""Whole clips a step for the duration predictor."""


class Recording(NamedTuple):
    """One training clip."""

    wave: np.ndarray
    """float32 [samples] at 16 kHz, at least 320 a frame."""
    frames: np.ndarray
    """Encoder features [frames, dimensions], so that any codebook can name their units."""
    speaker: int = 0


class VocoderTrainer(nn.Module):
    """Everything that is trained and saved: generator side and discriminators with their optimisers."""

    def __init__(self, vocoder: UnitVocoder, codebooks: list[Codebook], section: VocoderTrainingSection) -> None:
        super().__init__()
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
        codebook = trainer.codebooks[int(draw.integers(len(trainer.codebooks)))]
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
    segments = [
        _segment(recording(int(draw.integers(count))), section.segment_units, draw) for _ in range(section.batch)
    ]
    wanted = torch.from_numpy(np.stack([s.wave for s in segments]))
    frames = torch.from_numpy(np.stack([s.frames for s in segments]).astype(np.float32))
    speakers = torch.tensor([s.speaker for s in segments])
    table = trainer.table(codebook)
    made = vocoder(table[codebook.assign(frames)], speaker=speakers)
    spectral = mel_loss(made, wanted, section.mel_resolutions)
    durations = duration_loss(
        vocoder, table, codebook, [recording(int(draw.integers(count))) for _ in range(_DURATION_CLIPS)]
    )
    loss = _MEL_WEIGHT * spectral + durations
    losses = {"mel": spectral.item(), "duration": durations.item()}
    if step >= section.adversarial_from:
        judged = discriminator_loss(judges(wanted), judges(made.detach()))
        trainer.judge_optimizer.zero_grad()
        judged.backward()
        synchronise(judges)
        nn.utils.clip_grad_norm_(judges.parameters(), 10.0)
        trainer.judge_optimizer.step()
        judges.requires_grad_(False)
        real, fake = judges(wanted), judges(made)
        adversarial, features = adversarial_loss(fake), feature_loss(real, fake)
        loss = loss + adversarial + _FEATURE_WEIGHT * features
        losses |= {"discriminator": judged.item(), "adversarial": adversarial.item(), "features": features.item()}
    trainer.optimizer.zero_grad()
    loss.backward()
    judges.requires_grad_(True)
    synchronise(vocoder)
    nn.utils.clip_grad_norm_(vocoder.parameters(), 100.0)
    trainer.optimizer.step()
    return losses


def learning_rate(step: int, section: VocoderTrainingSection) -> float:
    """Warm-up over 50 steps, hold to half of the training, then linear to a tenth."""
    done = step / section.steps
    return section.learning_rate * min(1.0, (step + 1) / 50, max(0.1, 2 * (1 - done)))


def mel_loss(made: Tensor, wanted: Tensor, resolutions: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Mean absolute difference of log-mel spectra, averaged over resolutions. made, wanted: [clips, samples]."""
    return torch.stack([F.l1_loss(log_mel(made, *r), log_mel(wanted, *r)) for r in resolutions]).mean()


def log_mel(wave: Tensor, window: int, hop: int, bands: int) -> Tensor:
    """log(clamp(mel · sqrt(|STFT|² + 1e-9), 1e-5)), reflect-padded by (window - hop) / 2. [clips, bands, frames]."""
    padded = F.pad(wave[:, None], ((window - hop) // 2,) * 2, mode="reflect")[:, 0]
    spectrum = torch.stft(padded, window, hop, window=_hann(window), center=False, return_complex=True)
    magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
    return torch.log(torch.clamp(_mel_filters(window, bands) @ magnitude, min=1e-5))


def duration_loss(vocoder: UnitVocoder, table: Tensor, codebook: Codebook, recordings: list[Recording]) -> Tensor:
    """MSE(ŷ, log(duration + 1)) over the merged units of whole clips."""
    merged = [merge(codebook.assign(torch.from_numpy(r.frames.astype(np.float32))).numpy()) for r in recordings]
    length = max(len(m.units) for m in merged)
    units = torch.from_numpy(np.stack([np.pad(m.units, (0, length - len(m.units))) for m in merged]).astype(np.int64))
    lengths = torch.from_numpy(np.stack([np.pad(m.durations, (0, length - len(m.durations))) for m in merged]))
    mask = (lengths > 0).float()
    predicted = vocoder.dur_predictor(table[units], mask)
    return ((predicted - torch.log(lengths.float() + 1)).square() * mask).sum() / mask.sum()


def _segment(recording: Recording, frames: int, draw: np.random.Generator) -> Recording:
    """A random stretch of whole frames; a shorter clip is repeated until it is long enough."""
    usable = min(len(recording.frames), len(recording.wave) // FRAME)
    wave, features = recording.wave[: usable * FRAME], recording.frames[:usable]
    if usable < frames:
        times = -(-frames // usable)
        wave, features, usable = np.tile(wave, times), np.tile(features, (times, 1)), usable * times
    first = int(draw.integers(usable - frames + 1))
    cut = slice(first * FRAME, (first + frames) * FRAME)
    return Recording(wave[cut].astype(np.float32), features[first : first + frames], recording.speaker)


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
