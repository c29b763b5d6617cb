"""HuBERT's front end for inference on a CPU: the same features with less work, a clip at a time and so without padding.

- A convolution of stride s over rows [time, channels] is a matrix product on the rows as they lie in memory, s of them
  side by side; PyTorch's 1-D convolutions keep time innermost and turn everything round twice.
- The group norm of the first layer needs each channel's mean and variance over the clip. A channel is a weighted sum of
  ten samples, so both follow from the mean and the covariance of ten neighbouring samples, and the norm becomes part of
  the weights.
- Weights are laid out once (`packed_products`).
- Time goes through in blocks, so that what a layer passes on stays in the processor's cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.audio import FRAME, MIN_SAMPLES
from speechgpt.speech.packed_products import PackedWeight
from speechgpt.speech.split_products import SplitWeight, split

_BLOCK = 50
"""Frames that go through all layers together."""


class FrozenFrontEnd:
    """The convolutions of a transformers HuBERT with their weights as they are now.

    Takes a clip, float32 [samples] (400 or more), and gives [frames, channels] of the type asked for. split: the
    products are made as `split_products` says.
    """

    def __init__(self, layers: nn.ModuleList, dtype: torch.dtype = torch.float32, split: bool = False) -> None:
        first, *others = layers
        self._first = _FirstLayer(first, dtype)
        self._others = [(_SplitLayer if split else _Layer)(layer, dtype) for layer in others]

    def __call__(self, wave: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """moments: mean and variance of each channel after the first convolution, in place of the clip's own."""
        frames = (len(wave) - MIN_SAMPLES) // FRAME + 1
        weight, bias = self._first.fitted(wave, moments)
        blocks = []
        for start in range(0, frames, _BLOCK):
            end = min(frames, start + _BLOCK)
            x = self._first(wave[start * FRAME : (end - 1) * FRAME + MIN_SAMPLES], weight, bias)
            for layer in self._others:
                x = layer(x)
            blocks.append(x)
        return torch.cat(blocks)


class _Layer:
    """Convolution [time, in] -> [time / stride, out], the norm over channels if there is one, activation."""

    _kept: type = PackedWeight
    """What weights are kept as."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        convolution: nn.Conv1d = layer.conv  # type: ignore[assignment]
        self._activation: nn.Module = layer.activation  # type: ignore[assignment]
        self._stride, self._kernel = convolution.stride[0], convolution.kernel_size[0]
        weight = convolution.weight.detach().permute(2, 1, 0)
        # [out, taps]: those that lie in one row of `stride` samples; the last may hold fewer.
        parts = [part.flatten(0, 1).T.to(dtype) for part in weight.split(self._stride)]
        self._taps = [part.shape[1] for part in parts]
        self._parts: list[Any] = [self._kept(part) for part in parts]
        bias = weight.new_zeros(weight.shape[2]) if convolution.bias is None else convolution.bias.detach()
        self._bias = bias.to(dtype)
        norm = getattr(layer, "layer_norm", None)
        self._norm = None if norm is None else _over_channels(norm, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._sums(x, (len(x) - self._kernel) // self._stride + 1)
        if self._norm is not None:
            y = F.layer_norm(y, y.shape[1:], *self._norm)
        return self._activation(y)

    def _sums(self, x: Tensor, count: int) -> Tensor:
        y = self._parts[0].product(self._rows(x, count, 0), self._bias)
        for place, part in enumerate(self._parts[1:], 1):
            y = part.add_product(self._rows(x, count, place), y)
        return y

    def _rows(self, x: Tensor, count: int, place: int) -> Tensor:
        """What the `place`-th part of the weights is multiplied with, [count, its taps], as it lies in x."""
        row = self._stride * x.shape[1]
        return x.as_strided((count, self._taps[place]), (row, 1), x.storage_offset() + place * row)


class _SplitLayer(_Layer):
    _kept = SplitWeight

    def _sums(self, x: Tensor, count: int) -> Tensor:
        y = self._bias.repeat(count, 1)
        high, low = split(x)
        for place, part in enumerate(self._parts):
            part.add_product(y, self._rows(high, count, place), self._rows(low, count, place))
        return y


class _FirstLayer:
    """The layer that hears the samples themselves."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        convolution: nn.Conv1d = layer.conv  # type: ignore[assignment]
        self._activation: nn.Module = layer.activation  # type: ignore[assignment]
        self._stride, self._kernel = convolution.stride[0], convolution.kernel_size[0]
        self._dtype = dtype
        self._weight = convolution.weight.detach()[:, 0].double()
        self._bias = None if convolution.bias is None else convolution.bias.detach().double()
        norm = getattr(layer, "layer_norm", None)
        self._over_channels = _over_channels(norm, torch.float32) if isinstance(norm, nn.LayerNorm) else None
        self._over_time = None if norm is None or self._over_channels else norm

    def fitted(self, wave: Tensor, moments: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Weights and bias for this clip, with the norm over its own time in them."""
        weight = self._weight
        bias = weight.new_zeros(len(weight)) if self._bias is None else self._bias
        if self._over_time is not None:
            mean, variance = self._moments(wave) if moments is None else (moment.double() for moment in moments)
            scale = self._over_time.weight.detach().double() / torch.sqrt(variance + self._over_time.eps)
            bias = self._over_time.bias.detach().double() + (bias - mean) * scale
            weight = weight * scale[:, None]
        return weight.T.float().contiguous(), bias.float()

    def _moments(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over time of each channel, float64 [channels]."""
        windows = wave.unfold(0, self._kernel, self._stride).double()
        mean = windows.mean(0)
        covariance = windows.T @ windows / len(windows) - torch.outer(mean, mean)
        variance = ((self._weight @ covariance) * self._weight).sum(1).clamp(min=0)
        return self._weight @ mean + (0 if self._bias is None else self._bias), variance

    def __call__(self, wave: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.addmm(bias, wave.unfold(0, self._kernel, self._stride), weight)
        if self._over_channels is not None:
            y = F.layer_norm(y, y.shape[1:], *self._over_channels)
        return self._activation(y.to(self._dtype))


def _over_channels(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps


class FrozenPositions(nn.Module):
    """HuBERT's convolutional positions [clips, time, channels], with the weight norm folded.

    To compute that anew takes tens of milliseconds.
    """

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        convolution: nn.Conv1d = positions.conv  # type: ignore[assignment]
        self.activation: nn.Module = positions.activation  # type: ignore[assignment]
        self.groups, self.padding = convolution.groups, convolution.padding[0]
        weight = convolution.weight.detach().clone()
        self.weight = nn.Parameter(
            weight[:, :, None].contiguous(memory_format=torch.channels_last), requires_grad=False
        )
        self.bias = nn.Parameter(convolution.bias.detach().clone(), requires_grad=False)  # type: ignore[union-attr]

    def forward(self, hidden: Tensor) -> Tensor:
        image = hidden.transpose(1, 2)[:, :, None]
        y = F.conv2d(image, self.weight, self.bias, padding=(0, int(self.padding)), groups=self.groups)
        # A kernel of even length gives one frame too many.
        return self.activation(y[:, :, 0, : hidden.shape[1]]).transpose(1, 2)
