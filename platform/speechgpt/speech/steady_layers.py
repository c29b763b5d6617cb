"""Layers on rows [frames, channels] that give each row the same to the last bit, whatever rows come with it.

What is rounded to whole frames, or to a step of the pitch, must not depend on what else is in the piece. PyTorch's own
products in single precision do: one in a few thousand frames comes out a step away. oneDNN's make each row by the same
sums in the same order; what else the layers do, they do row by row. Where that does not hold (it is tried), or on a
GPU, they compute in double precision, half as fast, where the last digits are far below a step.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from speechgpt.speech.packed_products import PackedWeight

_TRIED = (1, 2, 3, 5, 8, 1, 13, 31)
"""Rows in the pieces with which layers are tried."""


class Stream(Protocol):
    def push(self, x: Tensor, /, last: bool) -> tuple[Tensor, ...]:
        """x: [1, channels, n]. What follows from it, time innermost, each result a time of its own behind."""


class Steady(Protocol):
    inputs: int
    """Channels."""

    def stream(self) -> Stream:
        """For one clip, from its beginning."""


_Made = TypeVar("_Made", bound=Steady)


def steady(make: Callable[[torch.dtype], _Made], device: torch.device) -> _Made:
    """Layers in single precision if pieces give what the whole does on this processor, else in double."""
    # Outside inference mode, so that they may be used there too.
    with torch.inference_mode(False), torch.no_grad():
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            made = make(torch.float32)
            if _holds(made):
                return made
        return make(torch.float64)


def _holds(made: Steady) -> bool:
    x = torch.randn(1, made.inputs, sum(_TRIED), generator=torch.Generator().manual_seed(0))
    stream = made.stream()
    pieces = [stream.push(piece, last=False) for piece in x.split(_TRIED, dim=2)]
    pieces.append(stream.push(x[:, :, :0], last=True))
    joined = [torch.cat(parts, dim=-1) for parts in zip(*pieces, strict=True)]
    return all(map(torch.equal, joined, made.stream().push(x, last=True)))


class Product:
    """An `nn.Linear` with its weights as they are now: [n, inputs] -> [n, outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        assert bias is not None
        self._weight, self._bias = PackedWeight(weight.to(dtype)), bias.detach().to(dtype, copy=True)

    def __call__(self, rows: Tensor) -> Tensor:
        if len(rows) == 1:
            # oneDNN sums a single row in another order.
            return self._weight.product(rows.repeat(2, 1), self._bias)[:1]
        return self._weight.product(rows, self._bias)


class Convolution:
    """A Conv1d of stride 1, without padding: [n + reach, in] -> [n, out]."""

    def __init__(self, layer: nn.Conv1d, dtype: torch.dtype) -> None:
        weight = layer.weight.detach().permute(0, 2, 1)
        self.reach, self._like = weight.shape[1] - 1, weight.new_zeros(0, weight.shape[2], dtype=dtype)
        self._product = Product(weight.flatten(1), layer.bias, dtype)

    def nothing(self, rows: int = 0) -> Tensor:
        return self._like.new_zeros(rows, self._like.shape[1])

    def __call__(self, x: Tensor, _usual: bool = False) -> Tensor:
        # What a result takes in lies side by side in memory.
        count, inputs = max(0, len(x) - self.reach), self._like.shape[1]
        return self._product(x.as_strided((count, (self.reach + 1) * inputs), (inputs, 1)))


class Depthwise:
    """The same with each channel for itself."""

    def __init__(self, layer: nn.Conv1d, dtype: torch.dtype) -> None:
        # [kernel, channels]
        self._taps = layer.weight.detach()[:, 0].T.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self._bias = layer.bias.detach().to(dtype, copy=True)  # type: ignore[union-attr]
        self.reach = len(self._taps) - 1

    def nothing(self, rows: int = 0) -> Tensor:
        return self._taps.new_zeros(rows, self._taps.shape[1])

    def __call__(self, x: Tensor, _usual: bool = False) -> Tensor:
        count = max(0, len(x) - self.reach)
        y = self._bias.repeat(count, 1)
        for place, tap in enumerate(self._taps):
            y.addcmul_(x[place : place + count], tap)
        return y
