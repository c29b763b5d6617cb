"""Distilling an encoder: it is asked for the teacher's unit at every frame of whole clips."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speechgpt.speech.hubert import HubertFeatures, frame_count, pad
from speechgpt.training.hearing import IGNORED, Batch, Clip, Objective


class Prototypes(nn.Module):
    """Logits of units by how near a frame lies to the point of each.

    A linear classifier leaves it open how frames of one unit are spread, and k-means, which measures distances, cuts
    across them; here the frames of a unit gather around its point, so that k-means finds the units again.
    """

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(classes, dimensions))
        self.sharpness = nn.Parameter(torch.tensor([dimensions**-0.5]).log())  # DeepSpeed sends no scalars

    def forward(self, frames: Tensor) -> Tensor:
        """[..., dimensions] -> [..., classes]."""
        nearness = frames @ self.points.T - self.points.square().sum(1) / 2
        return self.sharpness.exp() * nearness


class Student(Objective):
    """A HuBERT and a classifier of the teacher's units on its last used layer."""

    asked = "frame"

    def __init__(self, features: HubertFeatures, classes: int) -> None:
        super().__init__(features)
        self.head = Prototypes(features.dimensions, classes)

    def batch(self, clips: Sequence[Clip], seed: int) -> Batch:
        sound, lengths = pad([clip.wave for clip in clips], self._features.normalize)
        labels = torch.full((len(clips), frame_count(max(lengths))), IGNORED)
        for row, clip in zip(labels, clips, strict=True):
            row[: len(clip.targets)] = torch.from_numpy(clip.targets)
        return Batch(sound, lengths, labels)

    def logits(self, frames: Tensor) -> Tensor:
        return self.head(frames)
