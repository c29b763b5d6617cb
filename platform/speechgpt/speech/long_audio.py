"""Clips longer than one forward pass may hold, in pieces.

`published`: the original's independent chunks of 100 s (SPEC 2.1). Each boundary loses one frame, and the frames beside
it lack half of what they would have heard. For parity with units that the original made.

`overlapped`: windows that hear `context_seconds` more on either side, of which only the inner frames are kept. No frame
is lost: frame i is the sound at i x 320 samples, as in the whole clip. Normalisation and the group norm of the first
convolution are over the whole clip, so that all that is local (convolutions, positions) is exact; attention hears the
window alone, which is what keeps memory bounded, and all that differs from the whole clip.

`pauses`: cut at the quietest 0.2 s of the second half of each `seconds`, on the grid of frames; no frame is lost. Each
piece is a clip of its own, normalised by itself: its frames are those that it has alone, its units joined are the
clip's.

Share of units equal to the whole clip's, four minutes of the shipped recordings, shipped encoder: within 0.5 s of a
boundary 64 % in chunks of 30 s and 60 % of 100 s, 92 to 98 % in windows of either with 1 to 10 s of context; over all
frames 93 and 97 % in chunks, 92 to 98 % in windows. (Away from boundaries both differ from the whole alike: in how far
attention reaches.) `tests/speech/test_long_audio.py` holds the difference. The shipped encoder, which was trained on
short clips, has places where a clip may begin and then get two thirds of the units that it gets otherwise; windows that
happen to begin there do, too (those of 12 s with 5 s of context, of the first minute: 82 % over all).
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from speechgpt.speech.activity import frame_energies
from speechgpt.speech.audio import FRAME, MIN_SAMPLES, SAMPLE_RATE
from speechgpt.speech.config import LongAudioSection
from speechgpt.speech.hubert import ClipStatistics, HubertFeatures, Read, frame_count, whole_float32

_BLOCK = 10 * SAMPLE_RATE
"""Samples looked at in one go where statistics are gathered."""
_PAUSE = 10
"""Frames (0.2 s) that are to be quiet around a cut: longer than the closure of a plosive, within a word."""


class Window(NamedTuple):
    """A stretch of a clip that is encoded apart: samples [start, stop); after `skipped` frames, `kept` are kept."""

    start: int
    stop: int
    skipped: int
    kept: int


def chunks(samples: int, size: int) -> list[Window]:
    """The original's chunks of `size` samples; a last one too short for a frame, where the original fails, is left out.

    Raises ValueError for a clip without a frame.
    """
    _check(samples)
    stops = ((start, min(start + size, samples)) for start in range(0, samples, size))
    return [Window(a, b, 0, frame_count(b - a)) for a, b in stops if b - a >= MIN_SAMPLES]


def windows(samples: int, inner: int, context: int) -> list[Window]:
    """Windows that keep up to `inner` frames each and hear `context` frames more on either side.

    Their kept frames are the clip's, each once and in order. Raises ValueError for a clip without a frame.
    """
    _check(samples)
    total = frame_count(samples)
    found = []
    for first in range(0, total, inner):
        last = min(first + inner, total)
        start, end = max(0, first - context), min(total, last + context)
        # The clip's last samples make no frame, and are heard nevertheless, as they are in the whole clip.
        stop = samples if end == total else (end - 1) * FRAME + MIN_SAMPLES
        found.append(Window(start * FRAME, stop, first - start, last - first))
    return found


def at_pauses(wave: np.ndarray, longest: int) -> list[Window]:
    """Pieces of at most `longest` frames, and at least half of that where there are several, cut where it is quietest.

    Their frames are the clip's, each once and in order; a piece ends with its last frame, which reaches 80 samples into
    the next one. Of places that are equally quiet the last is taken. Raises ValueError for a clip without a frame.
    """
    _check(len(wave))
    total, half = frame_count(len(wave)), longest // 2
    # The mean of the _PAUSE frames around each boundary: place i is the boundary before frame i.
    sums = np.concatenate([[0.0], np.cumsum(frame_energies(wave), dtype=np.float64)])
    places = np.arange(len(sums))
    after, before = np.minimum(places + _PAUSE // 2, len(sums) - 1), np.maximum(places - _PAUSE // 2, 0)
    loudness = (sums[after] - sums[before]) / np.maximum(after - before, 1)
    cuts = [0]
    while total - cuts[-1] > longest:
        first = cuts[-1] + max(1, half)
        last = max(first, min(cuts[-1] + longest, total - half))
        quietest = np.argmin(loudness[first : last + 1][::-1])
        cuts.append(last - int(quietest))
    edges = pairwise([*cuts, total])
    # As in `windows`: the clip's last samples make no frame, and are heard nevertheless.
    return [Window(a * FRAME, len(wave) if b == total else (b - 1) * FRAME + MIN_SAMPLES, 0, b - a) for a, b in edges]


def plan(wave: np.ndarray, section: LongAudioSection) -> list[Window]:
    """The windows of a clip, by the recipe."""
    if section.mode == "published":
        return chunks(len(wave), round(section.seconds * SAMPLE_RATE))
    frames_a_second = SAMPLE_RATE / FRAME
    inner, context = max(1, round(section.seconds * frames_a_second)), section.context_seconds * frames_a_second
    if section.mode == "pauses":
        return at_pauses(wave, inner)
    return windows(len(wave), inner, math.ceil(context))


def frames_of(
    features: HubertFeatures,
    wave: np.ndarray,
    section: LongAudioSection,
    batch_seconds: float,
    read: Read | None = None,
) -> Iterator[torch.Tensor]:
    """The frames of one clip in order, a window at a time: float32 [kept, dimensions], or what `read` makes of them.

    wave: float32 [samples] at 16 kHz; a memory-mapped one is never read whole. batch_seconds: sound in one forward
    pass, unless a single window has more.
    """
    pieces = plan(wave, section)
    statistics = None
    if section.mode != "pauses":
        statistics = gather(features, wave, with_channels=section.mode == "overlapped")
    longest = max(piece.stop - piece.start for piece in pieces)
    together = max(1, int(batch_seconds * SAMPLE_RATE) // longest)
    for first in range(0, len(pieces), together):
        batch = pieces[first : first + together]
        waves = [np.array(wave[p.start : p.stop], np.float32) for p in batch]
        heard = features(waves, read) if statistics is None else features.of_stretches(waves, statistics, read)
        for piece, frames in zip(batch, heard, strict=True):
            yield frames[piece.skipped : piece.skipped + piece.kept]


@torch.inference_mode()
def gather(features: HubertFeatures, wave: np.ndarray, with_channels: bool) -> ClipStatistics:
    """What the front end would take from the whole clip at once, block by block.

    with_channels: also the moments of the first convolution's channels, for a front end with group norm.
    """
    mean, deviation = 0.0, 1.0
    if features.normalize:
        moments = np.zeros(2)
        for start in range(0, len(wave), _BLOCK):
            block = np.array(wave[start : start + _BLOCK], np.float64)
            moments += block.sum(), np.square(block).sum()
        mean, square = moments / len(wave)
        deviation = math.sqrt(max(square - mean**2, 0.0) + torch.nn.LayerNorm(1).eps)
    whole = ClipStatistics(mean, deviation)
    if not with_channels or (convolution := features.first_convolution) is None:
        return whole
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    frames = (len(wave) - kernel) // stride + 1
    sums = torch.zeros(2, convolution.out_channels, dtype=torch.float64)
    for first in range(0, frames, _BLOCK // stride):
        last = min(first + _BLOCK // stride, frames)
        stretch = whole.normalised(np.array(wave[first * stride : (last - 1) * stride + kernel], np.float32))
        with whole_float32():
            out = convolution(stretch.to(convolution.weight.device)[None, None])[0].double()
        sums += torch.stack([out.sum(-1), out.square().sum(-1)]).cpu()
    channel_mean = sums[0] / frames
    variance = (sums[1] / frames - channel_mean.square()).clamp(min=0)
    return whole._replace(channels=(channel_mean.float(), variance.float()))


def _check(samples: int) -> None:
    if samples < MIN_SAMPLES:
        raise ValueError(f"a clip of {samples} samples has no frame; at least {MIN_SAMPLES} are needed")
