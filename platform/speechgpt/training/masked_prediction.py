"""HuBERT's own training: cross-entropy against a teacher's unit at every frame that the transformer was not shown."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import distributed, nn

from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.config import EncoderTrainingSection, MaskingSection
from speechgpt.speech.hubert import HubertFeatures, frame_count, pad
from speechgpt.training.distillation import Clip, Progress, changed, learning_rate
from speechgpt.training.engine import set_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_IGNORED = -100
"""Label of a frame that is not learnt from."""
_LEAST_SPANS = 2
"""Hidden stretches of a clip that has room for them, as in HuBERT."""


class Batch(NamedTuple):
    """Clips as the model takes them, and what it is asked about them."""

    sound: torch.Tensor
    """[clips, samples], normalised, zero after each clip."""
    lengths: list[int]
    """Samples of each."""
    hidden: torch.Tensor
    """bool [clips, frames]."""
    labels: torch.Tensor
    """int64 [clips, frames]: the teacher's unit of each hidden frame, else -100."""


class Losses(NamedTuple):
    """Sums over the hidden frames of a batch."""

    total: torch.Tensor
    """Nats, with gradients."""
    right: torch.Tensor
    frames: torch.Tensor


class MaskedPredictor(nn.Module):
    """A HuBERT, and how alike its projected frames are to an embedding of each of the teacher's units.

    The model needs the embedding of what is hidden (`architecture`). The layer of `features` is the one that predicts.
    """

    def __init__(self, features: HubertFeatures, classes: int, section: MaskingSection) -> None:
        super().__init__()
        self.hubert = features.model.train()
        self.projection = nn.Linear(features.dimensions, section.projection)
        self.units = nn.Parameter(torch.empty(classes, section.projection).uniform_())
        self._features, self._temperature = features, section.temperature

    def forward(self, batch: Batch) -> Losses:
        frames = self._features.forward(batch.sound, batch.lengths, batch.hidden)
        asked = batch.labels != _IGNORED
        labels = batch.labels[asked]
        heard = nn.functional.normalize(self.projection(frames[asked]).float(), dim=-1)
        logits = heard @ nn.functional.normalize(self.units.float(), dim=-1).T / self._temperature
        right = (logits.argmax(-1) == labels).sum()
        return Losses(nn.functional.cross_entropy(logits, labels, reduction="sum"), right, torch.tensor(len(labels)))


def architecture(section: EncoderTrainingSection, fields: dict) -> dict:
    """HubertConfig fields of a model that something can be hidden from."""
    masked = section.masked
    # transformers counts in hidden frames, HuBERT in beginnings of stretches.
    share = min(1.0, masked.start_probability * masked.span)
    return {**fields, "mask_time_prob": share, "mask_time_length": masked.span, "mask_time_min_masks": _LEAST_SPANS}


def hide(frames: list[int], section: MaskingSection, seed: int) -> np.ndarray:
    """What to hide of clips of so many frames: bool [clips, frames of the longest]. Too short a clip stays in view."""
    from transformers.models.hubert.modeling_hubert import _compute_mask_indices

    longest = max(frames)
    inside = np.arange(longest) < np.array(frames)[:, None]
    if longest < section.span:
        return np.zeros_like(inside)
    attention: Any = torch.from_numpy(inside)
    kept = np.random.get_state()
    np.random.seed(seed % 2**32)  # transformers draws from numpy's own generator
    try:
        share = min(1.0, section.start_probability * section.span)
        found = _compute_mask_indices(inside.shape, share, section.span, attention, _LEAST_SPANS)
    finally:
        np.random.set_state(kept)
    return found & inside


def batch_of(clips: list[Clip], section: MaskingSection, seed: int, normalize: bool) -> Batch:
    sound, lengths = pad([clip.wave for clip in clips], normalize)
    hidden = hide([frame_count(samples) for samples in lengths], section, seed)
    labels = np.full(hidden.shape, _IGNORED, np.int64)
    for row, clip in zip(labels, clips, strict=True):
        row[: len(clip.targets)] = clip.targets
    labels[~hidden] = _IGNORED
    return Batch(sound, lengths, torch.from_numpy(hidden), torch.from_numpy(labels))


def pretrain(
    engine: "DeepSpeedEngine",
    clip: Callable[[int], Clip],
    batches: Iterator[list[int]],
    section: EncoderTrainingSection,
    *,
    seed: int,
    normalize: bool,
    first_step: int = 0,
) -> Iterator[Progress]:
    """Train the MaskedPredictor under `engine` from `first_step` on, one optimiser step at a time.

    batches: this rank's, which must already stand at that step. A step's loss is the mean over the hidden frames of all
    ranks, whichever had more; dropout and what is hidden are functions of seed, step and rank.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for step in range(first_step, section.steps):
        draw = np.random.default_rng((seed, step, rank))
        torch.manual_seed(int(draw.integers(2**62)))
        waves, targets = changed([clip(i) for i in next(batches)], section.augment, draw)
        clips = [Clip(*pair) for pair in zip(waves, targets, strict=True)]
        batch = on(batch_of(clips, section.masked, int(draw.integers(2**32)), normalize), engine.device)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=section.precision == "bf16"):
            losses = engine(batch)
        sums = torch.stack([each.detach().to(engine.device, torch.float64) for each in losses])
        distributed.all_reduce(sums)
        total, right, frames = sums.tolist()
        # DeepSpeed takes the mean over ranks; this makes it the mean over hidden frames.
        engine.backward(losses.total * (world / max(frames, 1.0)))
        set_rate(engine, learning_rate(step, section))
        engine.step()
        heard = sum(batch.lengths) / SAMPLE_RATE
        yield Progress(step + 1, total / max(frames, 1.0), right / max(frames, 1.0), heard)


@torch.no_grad()
def measure(model: MaskedPredictor, clips: list[Clip], section: MaskingSection, normalize: bool) -> dict[str, float]:
    """Of unchanged clips, each with the same frames hidden at every look: loss in nats and share of right units."""
    model.eval()
    total = right = frames = 0.0
    for number, each in enumerate(clips):
        losses = model(on(batch_of([each], section, number, normalize), model.units.device))
        total += float(losses.total)
        right += int(losses.right)
        frames += int(losses.frames)
    model.train()
    if not frames:
        return {"hidden_loss": math.nan, "hidden_accuracy": math.nan}
    return {"hidden_loss": total / frames, "hidden_accuracy": right / frames}


def on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.sound.to(device), batch.lengths, batch.hidden.to(device), batch.labels.to(device))
