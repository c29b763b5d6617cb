"""Convolutions and overlap-add over a signal that comes piece by piece: the pieces joined equal the whole's result.

Each layer takes the next samples, possibly none, and gives all that follows from what it has been given; `last` says
that nothing more comes. Between calls it keeps the samples that it will need again, and no others.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Waiting:
    """Samples that wait for others of the same place, which take a longer way. They are counted along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        self._dim = dim
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._parts.append(x)

    def __len__(self) -> int:
        return sum(part.shape[self._dim] for part in self._parts)

    def parts(self, count: int) -> list[Tensor]:
        """The first `count` samples, in the pieces in which they came. Raises RuntimeError when there are fewer."""
        taken: list[Tensor] = []
        if count > len(self):
            raise RuntimeError(f"{len(self)} samples wait, {count} were wanted")
        while count:
            first = self._parts.pop(0)
            size = first.shape[self._dim]
            if size > count:
                # A copy, or the rest would keep all of it alive.
                rest = first.narrow(self._dim, count, size - count).clone()
                self._parts.insert(0, rest)
                first = first.narrow(self._dim, 0, count)
            taken.append(first)
            count -= first.shape[self._dim]
        return taken

    def take(self, count: int) -> Tensor:
        """The first `count` samples, joined; there must have been something, be it empty."""
        taken = self.parts(count)
        return torch.cat(taken or [self._parts[0].narrow(self._dim, 0, 0)], dim=self._dim)

    def add_to(self, x: Tensor) -> None:
        """Add the first `len(x)` rows to x, in place."""
        start = 0
        for part in self.parts(len(x)):
            x[start : start + len(part)] += part
            start += len(part)


class ConvolutionStream:
    """A Conv1d of stride 1 that keeps the length, with zeros beyond both ends: [1, channels, n] -> [1, channels, m]."""

    def __init__(self, layer: nn.Conv1d) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
        self._groups = layer.groups
        self._reach = layer.kernel_size[0] - 1
        self._margin = self._reach // 2
        self._kept = self._weight.new_zeros(1, layer.in_channels, self._margin)

    def push(self, x: Tensor, last: bool) -> Tensor:
        x = torch.cat([self._kept, F.pad(x, (0, self._margin)) if last else x], dim=2)
        self._kept = x[:, :, max(0, x.shape[2] - self._reach) :].clone()
        if x.shape[2] <= self._reach:
            return x.new_zeros(1, len(self._weight), 0)
        return F.conv1d(x, self._weight, self._bias, groups=self._groups)


class RowsLayer(Protocol):
    """A convolution of stride 1 on rows, without padding: [n + reach, in] -> [n, out]."""

    reach: int

    def nothing(self, rows: int = 0) -> Tensor:
        """Rows of silence that it would take."""

    def __call__(self, x: Tensor, usual: bool, /) -> Tensor:
        """usual: whether this length comes again and again."""


class RowsStream:
    """The same of a layer on rows [n, in] -> [m, out], after a leaky ReLU of the given slope if any."""

    def __init__(self, layer: RowsLayer, leaky: float | None = None) -> None:
        self._layer, self._leaky = layer, leaky
        self._margin = layer.reach // 2
        self._kept = layer.nothing(self._margin)

    def push(self, x: Tensor, last: bool, usual: bool = False) -> Tensor:
        before = len(self._kept)
        rows = x.new_empty(before + len(x) + (self._margin if last else 0), x.shape[1])
        rows[:before] = self._kept
        new = rows[before : before + len(x)]
        if self._leaky is None:
            new.copy_(x)
        else:
            torch._C._nn.leaky_relu(x, self._leaky, out=new)
        rows[before + len(x) :] = 0
        self._kept = rows[max(0, len(rows) - self._layer.reach) :].clone()
        return self._layer(rows, usual)


class OverlapStream:
    """The sum of overlapping windows, one every `hop` samples, without what lies beyond both ends of the signal."""

    def __init__(self, window: int, hop: int, like: Tensor) -> None:
        self._hop, self._margin = hop, (window - hop) // 2
        self._tail = like.new_zeros(1, window - hop)
        self._skip = self._margin

    def push(self, joined: Tensor, count: int, last: bool) -> Tensor:
        """joined: the next `count` windows added at their places, [1, (count - 1) hop + window]."""
        size = count * self._hop
        total = joined.clone()
        total[:, : self._tail.shape[1]] += self._tail
        self._tail = total[:, size:].clone()
        # At the end one margin of the tail is the signal's, the other lies beyond it.
        ready = total[:, self._skip : size + (self._margin if last else 0)]
        self._skip = max(0, self._skip - size)
        return ready


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
