"""Waveform generators of the unit vocoder: frames of 20 ms in, 320 samples a frame out, batched without leaks.

Every layer is followed by the clip's own mask, so that a clip in a padded batch sounds as it does alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from speechgpt.speech.audio import FRAME
from speechgpt.speech.config import GeneratorSection

Mask = Tensor | None
"""[clips, 1, frames], 1 inside a clip; None when all clips of the batch are equally long."""


def _masked(x: Tensor, mask: Mask) -> Tensor:
    return x if mask is None else x * mask


class ResBlock(nn.Module):
    """HiFi-GAN's ResBlock1: dilated convolutions around a residual (SPEC 4.2)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Module:
            padding = (kernel - 1) * dilation // 2
            return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding))

        self.convs1 = nn.ModuleList(convolution(d) for d in dilations)
        self.convs2 = nn.ModuleList(convolution(1) for _ in dilations)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            inner = _masked(first(F.leaky_relu(x, 0.1)), mask)
            x = x + _masked(second(F.leaky_relu(inner, 0.1)), mask)
        return x


class HifiGanGenerator(nn.Module):
    """CodeHiFiGAN's generator (SPEC 4.2). Layer names are the published ones."""

    def __init__(self, section: GeneratorSection) -> None:
        super().__init__()
        channels = section.upsample_initial_channel
        self.rates = section.upsample_rates
        self.conv_pre = weight_norm(nn.Conv1d(section.model_in_dim, channels, 7, padding=3))
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(section.upsample_rates, section.upsample_kernel_sizes, strict=True):
            self.ups.append(
                weight_norm(nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2))
            )
            channels //= 2
            for size, dilations in zip(section.resblock_kernel_sizes, section.resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(channels, size, dilations))
        self.kernels = len(section.resblock_kernel_sizes)
        self.conv_post = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))
        for module in (*self.ups, self.conv_post, *self.resblocks.modules()):
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                module.weight = nn.init.normal_(module.weight.detach(), std=0.01)

    def forward(self, frames: Tensor, mask: Mask = None) -> Tensor:
        """frames: [clips, model_in_dim, T] -> samples [clips, 320 T]."""
        x = _masked(self.conv_pre(frames), mask)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates, strict=True)):
            mask = None if mask is None else mask.repeat_interleave(rate, dim=2)
            x = _masked(up(F.leaky_relu(x, 0.1)), mask)
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            x = torch.stack([block(x, mask) for block in blocks]).sum(0) / self.kernels
        return torch.tanh(self.conv_post(F.leaky_relu(x))).squeeze(1)


class ConvNextBlock(nn.Module):
    """Depth-wise convolution, then a two-layer network in each frame, around a residual."""

    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 3 * channels)
        self.narrow = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.2))

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        y = self.norm(self.depthwise(x).transpose(1, 2))
        y = self.scale * self.narrow(F.gelu(self.widen(y)))
        return _masked(x + y.transpose(1, 2), mask)


class IstftGenerator(nn.Module):
    """ConvNeXt blocks that predict a short-time spectrum, and its inverse: a hundredth of HiFi-GAN's work, for CPUs.

    After Vocos (Siuzdak, 2023). Spectra every 80 samples from windows of 320.
    """

    UP = 4
    HOP = FRAME // UP
    WINDOW = 4 * HOP

    window: Tensor

    def __init__(self, section: GeneratorSection) -> None:
        super().__init__()
        channels = section.istft_channels
        self.enter = nn.Conv1d(section.model_in_dim, channels, 7, padding=3)
        self.slow = nn.ModuleList(ConvNextBlock(channels) for _ in range(section.istft_blocks[0]))
        self.up = nn.Conv1d(channels, channels // 2 * self.UP, 1)
        self.fast = nn.ModuleList(ConvNextBlock(channels // 2) for _ in range(section.istft_blocks[1]))
        self.norm = nn.LayerNorm(channels // 2)
        self.spectrum = nn.Linear(channels // 2, self.WINDOW + 2)
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)

    def forward(self, frames: Tensor, mask: Mask = None) -> Tensor:
        """frames: [clips, model_in_dim, T] -> samples [clips, 320 T]."""
        x = _masked(self.enter(frames), mask)
        for block in self.slow:
            x = block(x, mask)
        clips, _, length = x.shape
        x = self.up(x).view(clips, -1, self.UP, length).transpose(2, 3).reshape(clips, -1, length * self.UP)
        mask = None if mask is None else mask.repeat_interleave(self.UP, dim=2)
        x = _masked(x, mask)
        for block in self.fast:
            x = block(x, mask)
        magnitude, phase = self.spectrum(self.norm(x.transpose(1, 2))).transpose(1, 2).chunk(2, dim=1)
        magnitude = _masked(torch.exp(magnitude.clamp(max=5.0)), mask)
        pieces = torch.fft.irfft(torch.polar(magnitude, phase), self.WINDOW, dim=1) * self.window[:, None]
        weight = self.window.square()[None, :, None].expand(clips, -1, pieces.shape[2])
        sound, envelope = self._overlap(pieces), self._overlap(_masked(weight, mask))
        return torch.clamp(sound / envelope.clamp(min=1e-3), -1.0, 1.0)

    def _overlap(self, pieces: Tensor) -> Tensor:
        """Add windowed pieces [clips, window, n] at their places; [clips, n * HOP], centred on the frames."""
        count = pieces.shape[2]
        size = (count - 1) * self.HOP + self.WINDOW
        joined = F.fold(pieces, (1, size), (1, self.WINDOW), stride=(1, self.HOP))[:, 0, 0]
        margin = (self.WINDOW - self.HOP) // 2
        return joined[:, margin : margin + count * self.HOP]
