"""Clips made at the lengths that the duration predictor gives their units, beside spectra moved to those lengths.

A generator that only ever saw the units' own lengths is thrown off by predicted ones, which are a frame off for every
third unit; what is served has no others. Sound cannot be moved without harm, its spectra can.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speechgpt.speech.audio import FRAME
from speechgpt.speech.durations import Rounding
from speechgpt.speech.units import Units, expand, merge
from speechgpt.speech.vocoder import UnitVocoder


class Pace(NamedTuple):
    """Clips at other lengths of their units."""

    codes: Tensor
    """One unit a frame, [clips, T]."""
    lengths: Tensor
    """Frames of each clip."""
    ends: tuple[np.ndarray, ...]
    """Where each clip's units end, in frames, from 0 on."""
    own_ends: tuple[np.ndarray, ...]
    """Where they ended in the recording."""

    @property
    def mask(self) -> Tensor:
        """[clips, 1, T], 1 inside a clip."""
        return (torch.arange(self.codes.shape[1]) < self.lengths[:, None])[:, None].float()

    def own_places(self, times: np.ndarray) -> np.ndarray:
        """The recordings' times of these ones, in frames, and as far behind a clip's end. [n] -> [clips, n]"""
        both = zip(self.ends, self.own_ends, strict=True)
        return np.stack([np.interp(times, ends, own) + (times - ends[-1]).clip(0) for ends, own in both])


def padded(merged: Sequence[Units]) -> tuple[Tensor, Tensor]:
    """Merged units of several clips and their durations, int64 [clips, units]; zeros behind a clip's end."""
    longest = max(len(m.units) for m in merged)

    def stacked(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).astype(np.int64))

    return stacked([m.units for m in merged]), stacked([m.durations for m in merged])


@torch.no_grad()
def at_predicted_lengths(vocoder: UnitVocoder, table: Tensor, codes: Tensor, lengths: Tensor) -> Pace:
    """The clips at predicted lengths, stretched to last as long as they did.

    table: unit embeddings; codes: one unit a frame, [clips, T]; lengths: frames of each clip. The vocoder must predict
    durations.
    """
    assert vocoder.dur_predictor is not None
    merged = [merge(row[:n].numpy()) for row, n in zip(codes, lengths.tolist(), strict=True)]
    units, durations = padded(merged)
    training = vocoder.dur_predictor.training
    # Dropout is for learning the durations, and these are taken as they are.
    spoken = torch.exp(vocoder.dur_predictor.eval()(table[units], (durations > 0).float())) - 1
    vocoder.dur_predictor.train(training)
    frames, ends, own_ends = [], [], []
    for row, m in zip(spoken, merged, strict=True):
        raw = row[: len(m.units)].double().clamp(min=0)
        rounding = Rounding(vocoder.section.rounding == "running")
        predicted = rounding.push(torch.log1p(raw * int(m.durations.sum()) / raw.sum().clamp(min=1e-6))).numpy()
        frames.append(expand(m._replace(durations=predicted)))
        ends.append(np.r_[0, predicted.cumsum()].astype(float))
        own_ends.append(np.r_[0, m.durations.cumsum()].astype(float))
    most = max(len(f) for f in frames)
    made = torch.from_numpy(np.stack([np.pad(f, (0, most - len(f))) for f in frames]).astype(np.int64))
    return Pace(made, torch.tensor([len(f) for f in frames]), tuple(ends), tuple(own_ends))


def moved(spectra: Tensor, hop: int, pace: Pace) -> Tensor:
    """Spectra of the recordings at the clips' new times, between frames on straight lines.

    spectra: [clips, bands, n], frame k around sample (k + ½) · hop. Returns [clips, bands, m] for the pace's frames.
    """
    count = pace.codes.shape[1] * FRAME // hop
    times = (np.arange(count) + 0.5) * hop / FRAME
    places = torch.from_numpy(pace.own_places(times) * FRAME / hop - 0.5).float().clamp(0, spectra.shape[2] - 1)
    left = places.floor().long()
    right = (left + 1).clamp(max=spectra.shape[2] - 1)
    shape = (-1, spectra.shape[1], -1)
    before, after = (spectra.gather(2, at[:, None].expand(shape)) for at in (left, right))
    return torch.lerp(before, after, (places - left)[:, None])


def moved_pitch(pitch: Tensor, pace: Pace) -> Tensor:
    """Hz of the nearest frame of the recordings. [clips, own T] -> [clips, T]"""
    times = np.arange(pace.codes.shape[1]) + 0.5
    places = torch.from_numpy(pace.own_places(times)).long().clamp(0, pitch.shape[1] - 1)
    return pitch.gather(1, places)
