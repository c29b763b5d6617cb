"""HuBERT's own training: it is asked for the teacher's unit at every frame that the transformer was not shown."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechgpt.speech.config import EncoderTrainingSection, MaskingSection
from speechgpt.speech.hubert import HubertFeatures, frame_count, pad
from speechgpt.training.hearing import IGNORED, Batch, Clip, Objective

_drawing = threading.Lock()
_LEAST_SPANS = 2
"""Hidden stretches of a clip that has room for them, as in HuBERT."""


class MaskedPredictor(Objective):
    """A HuBERT, and how alike its projected frames are to an embedding of each of the teacher's units.

    The model needs the embedding of what is hidden (`architecture`). The layer of `features` is the one that predicts.
    """

    asked = "hidden"

    def __init__(self, features: HubertFeatures, classes: int, section: MaskingSection) -> None:
        super().__init__(features)
        self.projection = nn.Linear(features.dimensions, section.projection)
        self.units = nn.Parameter(torch.empty(classes, section.projection).uniform_())
        self._section = section

    def batch(self, clips: Sequence[Clip], seed: int) -> Batch:
        sound, lengths = pad([clip.wave for clip in clips], self._features.normalize)
        hidden = hide([frame_count(samples) for samples in lengths], self._section, seed)
        labels = np.full(hidden.shape, IGNORED, np.int64)
        for row, clip in zip(labels, clips, strict=True):
            row[: len(clip.targets)] = clip.targets
        labels[~hidden] = IGNORED
        return Batch(sound, lengths, torch.from_numpy(labels), torch.from_numpy(hidden))

    def logits(self, frames: Tensor) -> Tensor:
        heard = nn.functional.normalize(self.projection(frames).float(), dim=-1)
        return heard @ nn.functional.normalize(self.units.float(), dim=-1).T / self._section.temperature


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
    share = min(1.0, section.start_probability * section.span)
    # transformers draws from numpy's own generator; batches are made ready while the model is measured.
    with _drawing:
        kept = np.random.get_state()
        np.random.seed(seed % 2**32)
        try:
            found = _compute_mask_indices(inside.shape, share, section.span, attention, _LEAST_SPANS)
        finally:
            np.random.set_state(kept)
    return found & inside
