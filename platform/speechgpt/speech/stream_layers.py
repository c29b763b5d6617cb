"""Convolutions and overlap-add over a signal that comes piece by piece: the pieces joined equal the whole's result.

Each layer takes the next samples [1, channels, n] (n may be 0) and gives all that follows from what it has been given;
`last` says that nothing more comes. Between calls it keeps the samples that it will need again, and no others.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(Protocol):
    def push(self, x: Tensor, last: bool) -> Tensor: ...


class Waiting:
    """Samples that wait for others of the same place, which take a longer way."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self._kept = x if self._kept is None else torch.cat([self._kept, x], dim=-1)

    def __len__(self) -> int:
        return 0 if self._kept is None else self._kept.shape[-1]

    def take(self, count: int) -> Tensor:
        """The first `count` samples. Raises RuntimeError when nothing was ever added."""
        if self._kept is None:
            raise RuntimeError("nothing waits")
        taken, self._kept = self._kept[..., :count], self._kept[..., count:].clone()
        return taken


class ConvolutionStream:
    """A Conv1d of stride 1 that keeps the length, with zeros beyond both ends of the signal."""

    def __init__(self, layer: nn.Conv1d) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
        self._dilation, self._groups = layer.dilation[0], layer.groups
        self._reach = (layer.kernel_size[0] - 1) * self._dilation
        self._margin = self._reach // 2
        self._kept = self._weight.new_zeros(1, layer.in_channels, self._margin)

    def push(self, x: Tensor, last: bool) -> Tensor:
        x = torch.cat([self._kept, F.pad(x, (0, self._margin)) if last else x], dim=2)
        self._kept = x[:, :, max(0, x.shape[2] - self._reach) :].clone()
        if x.shape[2] <= self._reach:
            return x.new_zeros(1, len(self._weight), 0)
        return F.conv1d(x, self._weight, self._bias, dilation=self._dilation, groups=self._groups)


class UpsamplingStream:
    """A ConvTranspose1d that gives `stride` samples for each; its kernel less its stride is twice its padding."""

    def __init__(self, layer: nn.ConvTranspose1d) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
        self._stride, self._margin = layer.stride[0], layer.padding[0]
        self._sum = OverlapStream(layer.out_channels, layer.kernel_size[0], self._stride, self._weight)

    def push(self, x: Tensor, last: bool) -> Tensor:
        joined = F.conv_transpose1d(x, self._weight, stride=self._stride) if x.shape[2] else None
        return self._sum.push(joined, x.shape[2], last) + self._bias[:, None]


class OverlapStream:
    """Sums overlapping windows [1, channels, window], one every `hop` samples, the first and last half out of sight."""

    def __init__(self, channels: int, window: int, hop: int, like: Tensor) -> None:
        self._hop, self._margin = hop, (window - hop) // 2
        self._tail = like.new_zeros(1, channels, window - hop)
        self._skip = self._margin

    def push(self, joined: Tensor | None, count: int, last: bool) -> Tensor:
        """joined: the sum of the next `count` windows at their places, [1, channels, (count - 1) hop + window]."""
        size = count * self._hop
        if joined is None:
            total = self._tail
        else:
            total = joined.clone()
            total[:, :, : self._tail.shape[2]] += self._tail
        self._tail = total[:, :, size:].clone()
        # At the end one margin of the tail is the signal's, the other lies beyond it.
        ready = total[:, :, : size + (self._margin if last else 0)]
        skipped = min(self._skip, ready.shape[2])
        self._skip -= skipped
        return ready[:, :, skipped:]


class WindowStream:
    """Windows of `size` samples, one every `hop`, centred on the hops; zeros beyond both ends of the signal."""

    def __init__(self, size: int, hop: int, like: Tensor) -> None:
        self._size, self._hop, self._margin = size, hop, (size - hop) // 2
        self._kept = like.new_zeros(1, self._margin)

    def push(self, x: Tensor, last: bool) -> Tensor:
        """x: [1, samples] -> [1, size, windows]."""
        x = torch.cat([self._kept, F.pad(x, (0, self._margin)) if last else x], dim=1)
        count = max(0, (x.shape[1] - self._size) // self._hop + 1)
        self._kept = x[:, count * self._hop :].clone()
        if not count:
            return x.new_zeros(1, self._size, 0)
        return x.unfold(1, self._size, self._hop).transpose(1, 2)
