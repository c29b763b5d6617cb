"""Speech to units: HuBERT features, then the nearest centroid, then merged repeats."""

import os

import numpy as np
import torch

from speechgpt.speech import long_audio
from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.codebook import Codebook, CodebookError
from speechgpt.speech.config import LongAudioSection
from speechgpt.speech.hubert import HubertFeatures, Precision, Read
from speechgpt.speech.units import Units, merge


class SpeechEncoder:
    """An encoder directory of a bundle: a HuBERT and its codebook.

    batch_seconds bounds one forward pass, padding included; it changes speed and memory, never units. long: how clips
    longer than its `seconds` are encoded; without it every clip is encoded whole, whatever memory that takes.
    """

    def __init__(
        self,
        features: HubertFeatures,
        codebook: Codebook,
        batch_seconds: float = 60.0,
        long: LongAudioSection | None = None,
    ) -> None:
        if features.dimensions != codebook.centroids.shape[1]:
            raise CodebookError(
                f"the codebook has {codebook.centroids.shape[1]} dimensions, the encoder {features.dimensions}"
            )
        self._features = features
        self._nearest = codebook.to(features.device).assign
        self.codebook = codebook
        self.batch_seconds = batch_seconds
        self.long = long

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        batch_seconds: float = 60.0,
        long: LongAudioSection | None = None,
        precision: Precision = "float32",
        device: str | None = None,
    ) -> "SpeechEncoder":
        features = HubertFeatures.load(directory, precision, device=device)
        return cls(features, Codebook.load(directory), batch_seconds, long)

    @property
    def clusters(self) -> int:
        return self.codebook.clusters

    @property
    def name(self) -> str:
        """What units came from: another layer, codebook or precision gives others."""
        rounded = "" if self._features.precision == "float32" else f"-{self._features.precision}"
        return f"hubert-L{self._features.layer}-km{self.clusters}{rounded}"

    def encode(self, waves: list[np.ndarray]) -> list[Units]:
        """waves: float32 [samples] at 16 kHz. Units of each, in the same order."""
        limit = self.long.seconds * SAMPLE_RATE if self.long else float("inf")
        short = [index for index, wave in enumerate(waves) if len(wave) <= limit]
        found = frames_of_each(self._features, [waves[index] for index in short], self.batch_seconds, self._nearest)
        whole = dict(zip(short, found, strict=True))
        return [
            merge(whole[index].numpy() if index in whole else self._assign_long(wave))
            for index, wave in enumerate(waves)
        ]

    def _assign_long(self, wave: np.ndarray) -> np.ndarray:
        """The unit of every frame, int16 [frames]. Features are dropped as they go: an hour of them is 0.5 GB."""
        assert self.long is not None
        units = long_audio.frames_of(self._features, wave, self.long, self.batch_seconds, self._nearest)
        return np.concatenate([each.numpy().astype(np.int16) for each in units])


def frames_of_each(
    features: HubertFeatures, waves: list[np.ndarray], batch_seconds: float, read: Read | None = None
) -> list[torch.Tensor]:
    """float32 [frames, dimensions] of each wave, or what `read` makes of them, in the same order, computed in batches
    of like length."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(waves)
    for batch in batches_by_length([len(wave) for wave in waves], int(batch_seconds * SAMPLE_RATE)):
        for index, frames in zip(batch, features([waves[i] for i in batch], read), strict=True):
            results[index] = frames
    return results


def batches_by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped by like length, so that longest x count stays within `budget` (one clip always may)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
