"""Distilling an encoder: cross-entropy against a teacher's unit at every frame of whole, changed clips."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.augment import augment
from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.speech.encoder import batches_by_length
from speechgpt.speech.hubert import HubertFeatures, frame_count, pad

_POOL = 32
"""Batches whose clips are sorted by length together: enough for little padding, few enough to stay shuffled."""


class Clip(NamedTuple):
    wave: np.ndarray
    """float32 [samples] at 16 kHz."""
    targets: np.ndarray
    """int [frames], the teacher's unit of each."""


class Prototypes(nn.Module):
    """Logits of units by how near a frame lies to the point of each.

    A linear classifier leaves it open how frames of one unit are spread, and k-means, which measures distances, cuts
    across them; here the frames of a unit gather around its point, so that k-means finds the units again.
    """

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(classes, dimensions))
        self.sharpness = nn.Parameter(torch.tensor(dimensions**-0.5).log())

    def forward(self, frames: Tensor) -> Tensor:
        """[..., dimensions] -> [..., classes]."""
        nearness = frames @ self.points.T - self.points.square().sum(1) / 2
        return self.sharpness.exp() * nearness


class Student(nn.Module):
    """A HuBERT and a classifier of the teacher's units on its last used layer."""

    def __init__(self, features: HubertFeatures, classes: int) -> None:
        super().__init__()
        self.hubert = features.model.train()
        self.head = Prototypes(features.dimensions, classes)
        self._features = features

    def forward(self, batch: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """batch: [clips, samples]. Returns logits [clips, frames, classes]."""
        return self.head(self._features.forward(batch, lengths))


@dataclass(frozen=True)
class Progress:
    """What one step reports."""

    step: int
    loss: float
    accuracy: float
    """Share of frames whose unit was right."""
    seconds: float
    """Audio in the step."""


def batch_plan(seconds: list[float], section: EncoderTrainingSection, world: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of clip indices in an order of the seed; batch `step * world + rank` is that rank's."""
    budget = int(section.batch_seconds * 1000)
    epoch = 0
    while True:
        draw = np.random.default_rng((seed, epoch))
        order = draw.permutation(len(seconds))
        pool = max(1, int(_POOL * section.batch_seconds / max(float(np.mean(seconds)), 1e-3)))
        for start in range(0, len(order), pool):
            indices = order[start : start + pool]
            batches = batches_by_length([int(seconds[i] * 1000) for i in indices], budget)
            for which in draw.permutation(len(batches)):
                yield [int(indices[i]) for i in batches[which]]
        epoch += 1


def learning_rate(step: int, section: EncoderTrainingSection) -> float:
    """Warm-up over 4 % of the steps, hold to 40 %, then linear to 2 % of the peak."""
    done = step / section.steps
    return section.learning_rate * min(1.0, (done + 1 / section.steps) / 0.04, max(0.02, (1 - done) / 0.6))


def distil(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: Callable[[int], Clip],
    batches: Iterator[list[int]],
    section: EncoderTrainingSection,
    *,
    seed: int,
    normalize: bool,
    first_step: int = 0,
) -> Iterator[Progress]:
    """Train from `first_step` on, one optimiser step at a time. `batches` must already stand at that step."""
    for step in range(first_step, section.steps):
        draw = np.random.default_rng((seed, step))
        torch.manual_seed(int(draw.integers(2**62)))  # dropout is a function of seed and step, too
        waves, targets = changed([clip(i) for i in next(batches)], section.augment, draw)
        batch, lengths = pad(waves, normalize)
        with torch.autocast("cpu", torch.bfloat16, enabled=section.precision == "bf16"):
            logits = student(batch, lengths).float()
        labels = torch.full(logits.shape[:2], -100)
        for row, wanted in zip(labels, targets, strict=True):
            row[: len(wanted)] = torch.from_numpy(wanted.astype(np.int64))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, section)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        known = labels >= 0
        right = (logits.argmax(-1) == labels)[known].float().mean()
        yield Progress(step + 1, loss.item(), right.item(), sum(lengths) / SAMPLE_RATE)


def frame_accuracy(student: Student, clips: list[Clip], normalize: bool) -> float:
    """Share of frames of unchanged clips whose teacher unit the student finds."""
    student.eval()
    right = total = 0
    with torch.inference_mode():
        for wave, targets in clips:
            batch, lengths = pad([wave], normalize)
            found = student(batch, lengths)[0, : frame_count(lengths[0])].argmax(-1).numpy()
            right += int((found == targets).sum())
            total += len(targets)
    student.train()
    return right / max(total, 1)


def changed(clips: list[Clip], share: float, draw: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves and targets, that share of the clips augmented."""
    pairs = [augment(wave, targets, draw) if draw.random() < share else (wave, targets) for wave, targets in clips]
    return [wave for wave, _ in pairs], [targets for _, targets in pairs]
