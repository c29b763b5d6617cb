"""The unit HiFi-GAN's layers for inference on a CPU: signals as rows [samples, channels], weights laid out once.

PyTorch's own 1-D convolutions keep time innermost, and turn it and the weights around at every call; for this
generator that and what is not in the cache cost as much as the arithmetic.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.generators import HifiGanGenerator

# Code is compiled for each length of each layer, some 70 pieces of it a length, and costs ten milliseconds a piece.
# With oneDNN's own limit of 1024 those of a long clip would push out those of the next. Read at oneDNN's first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")

LONGEST = 500
"""Frames of a clip that is made in one pass."""


class FrozenConvolution:
    """A Conv1d of stride 1, without padding: [n + reach, in] -> [n, out]. What is learned later does not reach it."""

    def __init__(self, layer: nn.Conv1d, dtype: torch.dtype) -> None:
        self._freeze(layer.weight.detach(), layer.bias.detach(), layer.dilation[0], dtype)  # type: ignore[union-attr]

    def _freeze(self, weight: Tensor, bias: Tensor, dilation: int, dtype: torch.dtype) -> None:
        self._dilation = dilation
        self.reach = (weight.shape[2] - 1) * dilation
        """Rows that a result takes in besides one."""
        # Outside inference mode: a tensor made in it cannot be packed.
        with torch.inference_mode(False), torch.no_grad():
            self._taps, self._bias = weight.clone().permute(2, 1, 0).contiguous(), bias.clone()
            self._packed, self._packed_bias = _packed(self._taps.to(dtype), dilation), self._bias.to(dtype)

    def nothing(self, rows: int = 0) -> Tensor:
        """Rows of silence that it would take."""
        return self._packed_bias.new_zeros(rows, self._taps.shape[1])

    def __call__(self, x: Tensor, usual: bool) -> Tensor:
        """usual: this length comes again and again, so that code compiled for it pays (about a millisecond)."""
        count = max(0, len(x) - self.reach)
        if not count:
            return x.new_zeros(0, self._taps.shape[2])
        if usual and self._packed is not None:
            return self._compiled(x)
        # In float32, for which nothing is compiled.
        rows = x.float()
        if self._taps.shape[2] == 1:
            return self._single(rows, count).to(x.dtype)
        # A matrix product for each tap, on the rows as they lie.
        y = torch.addmm(self._bias, rows[:count], self._taps[0])
        for start, tap in zip(range(self._dilation, self.reach + 1, self._dilation), self._taps[1:], strict=True):
            y.addmm_(rows[start : start + count], tap)
        return y.to(x.dtype)

    def add_padded(self, total: Tensor, x: Tensor) -> Tensor:
        """Add what `padded` gives to `total` [n, out], in place; in one pass where the CPU's convolutions can."""
        if self._packed is None:
            return total.add_(self.padded(x))
        torch.ops.mkldnn._convolution_pointwise_(
            _image(total),
            _image(x),
            self._packed,
            self._packed_bias,
            [0, self.reach // 2],
            [1, 1],
            [1, self._dilation],
            1,
            "add",
            1.0,
            None,
            [],
            None,
        )
        return total

    def padded(self, x: Tensor, leaky: float | None = None) -> Tensor:
        """With zeros at both ends, [n, in] -> [n, out], and a leaky ReLU after it if `leaky` gives its slope."""
        if self._packed is not None:
            return self._compiled(x, self.reach // 2, leaky)
        margin = self.nothing(self.reach // 2)
        y = self(torch.cat([margin, x, margin]), usual=True)
        return y if leaky is None else F.leaky_relu_(y, leaky)

    def _compiled(self, x: Tensor, padding: int = 0, leaky: float | None = None) -> Tensor:
        attribute, scalars = ("none", []) if leaky is None else ("leaky_relu", [leaky])
        y = torch.ops.mkldnn._convolution_pointwise(
            _image(x),
            self._packed,
            self._packed_bias,
            [0, padding],
            [1, 1],
            [1, self._dilation],
            1,
            attribute,
            scalars,
            "",
        )
        return y[0, :, 0].T

    def _single(self, x: Tensor, count: int) -> Tensor:
        """One channel out: all taps in one product, then their diagonal."""
        products = x @ self._taps[:, :, 0].T
        y = self._bias.expand(count, 1)
        for tap in range(len(self._taps)):
            y = y + products[tap * self._dilation :][:count, tap : tap + 1]
        return y


class FrozenUpsampling(FrozenConvolution):
    """A ConvTranspose1d that gives `rate` samples for each: a convolution that gives them as further channels.

    [n + reach, in] -> [n · rate, out]: as rows, the further channels lie in memory as the samples that they are.
    """

    def __init__(self, layer: nn.ConvTranspose1d, dtype: torch.dtype) -> None:
        weight, bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[union-attr]
        rate, kernel, padding = layer.stride[0], layer.kernel_size[0], int(layer.padding[0])
        self._channels = layer.out_channels
        # Input sample t + shift reaches output sample t · rate + phase through the kernel's entry `tap`.
        taps = {
            (phase, shift): tap
            for phase in range(rate)
            for shift in range(-kernel, kernel + 1)
            if 0 <= (tap := phase + padding - shift * rate) < kernel
        }
        margin = max(abs(shift) for _, shift in taps)
        spread = weight.new_zeros(rate, self._channels, layer.in_channels, 2 * margin + 1)
        for (phase, shift), tap in taps.items():
            spread[phase, :, :, margin + shift] = weight[:, :, tap].T
        self._freeze(spread.flatten(0, 1), bias.repeat(rate), 1, dtype)

    def __call__(self, x: Tensor, usual: bool) -> Tensor:
        return super().__call__(x, usual).reshape(-1, self._channels)

    def padded(self, x: Tensor, leaky: float | None = None) -> Tensor:
        return super().padded(x, leaky).reshape(-1, self._channels)


class FrozenHifiGan:
    """The layers of a `HifiGanGenerator` with its weights as they are now, in float32 or bfloat16."""

    def __init__(self, generator: HifiGanGenerator, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.enter = FrozenConvolution(generator.conv_pre, dtype)
        self.ups = [FrozenUpsampling(up, dtype) for up in generator.ups]  # type: ignore[arg-type]
        blocks = [
            [
                (FrozenConvolution(first, dtype), FrozenConvolution(second, dtype))
                for first, second in zip(block.convs1, block.convs2, strict=True)  # type: ignore[arg-type]
            ]
            for block in generator.resblocks
        ]
        count = generator.kernels
        self.blocks = [blocks[i : i + count] for i in range(0, len(blocks), count)]
        """Of each level, of each kernel size, of each dilation: the two convolutions."""
        self.leave = FrozenConvolution(generator.conv_post, dtype)
        self.rates = generator.rates

    def __call__(self, frames: Tensor) -> Tensor:
        """A whole clip of at most `LONGEST` frames: [model_in_dim, T] -> float32 [320 T]."""
        length = frames.shape[1]
        # Few lengths, because each costs a tenth of a second to compile; what follows the clip is silenced again after
        # each layer, as if nothing did.
        x = F.pad(frames, (0, _rounded(length) - length)).T.to(self.dtype).contiguous()
        end = length
        x = _silent(self.enter.padded(x, 0.1), end)
        for up, rate, blocks in zip(self.ups, self.rates, self.blocks, strict=True):
            end *= rate
            x = _silent(up.padded(x), end)
            total = self._block(x, blocks[0], end)
            for pairs in blocks[1:]:
                total += self._block(x, pairs, end)
            slope = 0.01 if blocks is self.blocks[-1] else 0.1
            x = F.leaky_relu_(total.div_(len(blocks)), slope)
        return torch.tanh_(self.leave.padded(x)[:end, 0].float())

    @staticmethod
    def _block(given: Tensor, pairs: list[tuple[FrozenConvolution, FrozenConvolution]], end: int) -> Tensor:
        x = given
        for first, second in pairs:
            inner = _silent(first.padded(F.leaky_relu(x, 0.1), 0.1), end)
            x = _silent(second.add_padded(x.clone() if x is given else x, inner), end)
        return x


def _image(x: Tensor) -> Tensor:
    """Rows as an image of height 1 with channels innermost, which they are already."""
    return x.T[None, :, None]


def _silent(x: Tensor, start: int) -> Tensor:
    x[start:] = 0
    return x


def _rounded(frames: int) -> int:
    """Up to a multiple of half a second, of a second for longer clips: as many lengths as the code cache has room."""
    step = 25 if frames <= 200 else 50
    return -(-frames // step) * step


def _packed(taps: Tensor, dilation: int) -> Tensor | None:
    """The weights [taps, in, out] as the CPU's convolutions want them; None where there are no such convolutions."""
    if taps.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    image = taps.permute(2, 1, 0)[:, :, None].contiguous()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(image.to_mkldnn(), [0, 0], [1, 1], [1, dilation], 1)
