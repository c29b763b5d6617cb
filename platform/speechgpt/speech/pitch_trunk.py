"""The layers of an `IstftGenerator` from which the pitch comes: with gradients, and for inference in pieces."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.steady_layers import Convolution, Depthwise, Product, steady
from speechgpt.speech.stream_layers import RowsStream, Waiting

if TYPE_CHECKING:
    from speechgpt.speech.generators import ConvNextBlock


class Layers(NamedTuple):
    """What an `IstftGenerator` does at 50 Hz."""

    enter: nn.Conv1d
    slow: "Sequence[ConvNextBlock]"
    near_pitch: nn.Conv1d
    to_pitch: nn.Conv1d


def through(layers: Layers, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """With gradients. frames: [clips, model_in_dim, T]; mask: [clips, 1, T].

    Returns features [clips, channels, T] and the octaves above 200 Hz [clips, T] that they make expect.
    """

    def masked(x: Tensor) -> Tensor:
        return x if mask is None else x * mask

    x = masked(layers.enter(frames))
    for block in layers.slow:
        x = block(x, mask)
    return x, layers.to_pitch(masked(F.gelu(layers.near_pitch(x))))[:, 0]


def trunk(layers: Layers) -> "Trunk":
    """The layers with their weights as they are now."""
    return steady(lambda dtype: Trunk(layers, dtype), layers.enter.weight.device)


class Trunk:
    """For inference; see `steady_layers`."""

    def __init__(self, layers: Layers, dtype: torch.dtype) -> None:
        self.inputs, self._channels, self.dtype = layers.enter.in_channels, layers.enter.out_channels, dtype
        self.enter = Convolution(layers.enter, dtype)
        self.slow = [_Block(block, dtype) for block in layers.slow]
        self.near_pitch, self.to_pitch = Convolution(layers.near_pitch, dtype), Convolution(layers.to_pitch, dtype)

    def stream(self) -> "TrunkStream":
        return TrunkStream(self)

    def whole(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `through`; features are float32, octaves float64, both zero beyond a clip."""
        # A CPU is busy with one clip; a batch would only add padding.
        clips, _, longest = frames.shape
        lengths = [longest] * clips if mask is None else mask[:, 0].sum(1).long().tolist()
        x = frames.new_zeros(clips, self._channels, longest, dtype=torch.float32)
        octaves = frames.new_zeros(clips, longest, dtype=torch.float64)
        for place, length in enumerate(lengths):
            given = frames[place : place + 1, :, :length]
            x[place, :, :length], octaves[place, :length] = self.stream().push(given, last=True)
        return x, octaves


class TrunkStream:
    """One clip, whose frames come piece by piece."""

    def __init__(self, trunk: Trunk) -> None:
        self._dtype = trunk.dtype
        self._enter, self._near_pitch, self._to_pitch = map(RowsStream, (trunk.enter, trunk.near_pitch, trunk.to_pitch))
        self._slow = [(RowsStream(block.depthwise), Waiting(dim=0), block) for block in trunk.slow]

    def push(self, frames: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """frames: [1, model_in_dim, n]. Returns the features that follow, float32 [1, channels, m], and the octaves,
        float64 [1, p], which come later."""
        x = self._enter.push(frames[0].T.to(self._dtype), last)
        for depthwise, residual, block in self._slow:
            residual.add(x)
            y = depthwise.push(x, last)
            x = residual.take(len(y)) + block.shaped(y)
        octaves = self._to_pitch.push(F.gelu(self._near_pitch.push(x, last)), last)
        return x.T[None].float(), octaves.T.double()


class _Block:
    """A `ConvNextBlock`."""

    def __init__(self, block: "ConvNextBlock", dtype: torch.dtype) -> None:
        self.depthwise = Depthwise(block.depthwise, dtype)
        self._norm, self._scale = copy.deepcopy(block.norm).to(dtype), block.scale.detach().to(dtype, copy=True)
        self._widen, self._narrow = (Product(each.weight, each.bias, dtype) for each in (block.widen, block.narrow))

    def shaped(self, y: Tensor) -> Tensor:
        """The network in each frame, [n, channels]."""
        return self._scale * self._narrow(F.gelu(self._widen(self._norm(y))))
