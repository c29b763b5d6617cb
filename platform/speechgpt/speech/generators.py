"""Waveform generators of the unit vocoder: frames of 20 ms in, 320 samples a frame out, batched without leaks.

Every layer is followed by the clip's own mask, so that a clip in a padded batch sounds as it does alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.pitch import HIGHEST, LOWEST
from speechgpt.speech.pitch_trunk import Layers, Trunk, through, trunk

Mask = Tensor | None
"""[clips, 1, frames], 1 inside a clip; None when all clips of the batch are equally long."""

_MIDDLE_PITCH = 200.0
"""Hz; predictions are octaves above or below it."""
_PITCH_STEPS = 1000
"""In an octave."""


class Sound(NamedTuple):
    """What a generator made."""

    samples: Tensor
    """[clips, 320 T], between -1 and 1."""
    octaves: Tensor | None = None
    """Pitch that the units made it expect, in octaves above 200 Hz, [clips, T]; None from a head that has no pitch."""


def version(module: nn.Module) -> tuple:
    """Differs after every change of a parameter, so that what was made from the weights is known to be out of date."""
    return tuple((parameter.device, parameter.data_ptr(), parameter._version) for parameter in module.parameters())


def octaves(pitch: Tensor) -> Tensor:
    """Hz as octaves above 200 Hz."""
    return torch.log2(pitch / _MIDDLE_PITCH)


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

    def forward(self, frames: Tensor, mask: Mask = None, pitch: Tensor | None = None) -> Sound:
        """frames: [clips, model_in_dim, T]. Pitch plays no part."""
        x = _masked(self.conv_pre(frames), mask)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates, strict=True)):
            mask = None if mask is None else mask.repeat_interleave(rate, dim=2)
            x = _masked(up(F.leaky_relu(x, 0.1)), mask)
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            x = torch.stack([block(x, mask) for block in blocks]).sum(0) / self.kernels
        return Sound(torch.tanh(self.conv_post(F.leaky_relu(x))).squeeze(1))


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
        return _masked(x + self.shaped(self.depthwise(x)), mask)

    def shaped(self, y: Tensor) -> Tensor:
        """The network in each frame. [clips, channels, T]."""
        y = self.narrow(F.gelu(self.widen(self.norm(y.transpose(1, 2)))))
        return (self.scale * y).transpose(1, 2)


class IstftGenerator(nn.Module):
    """ConvNeXt blocks that shape a pulse train and noise in the short-time spectrum: a hundredth of HiFi-GAN's work.

    The units do not say how high a voice is, so the pitch is predicted from them, and the pulses come at that pitch
    (source and filter, as in speech itself). Without them the phases of every harmonic would have to be learned, and
    the spectral loss would teach the mean over all pitches. Spectra every 80 samples from windows of 320.
    """

    UP = 4
    HOP = FRAME // UP
    WINDOW = 4 * HOP

    window: Tensor

    def __init__(self, section: GeneratorSection) -> None:
        super().__init__()
        channels, bins = section.istft_channels, self.WINDOW // 2 + 1
        self.enter = nn.Conv1d(section.model_in_dim, channels, 7, padding=3)
        self.slow = nn.ModuleList(ConvNextBlock(channels, section.istft_kernel) for _ in range(section.istft_blocks[0]))
        self.near_pitch, self.to_pitch = nn.Conv1d(channels, 64, 5, padding=2), nn.Conv1d(64, 1, 5, padding=2)
        self.from_pitch = nn.Conv1d(1, channels // 2, 1)
        self.up = nn.Conv1d(channels, channels // 2 * self.UP, 1)
        self.fast = nn.ModuleList(ConvNextBlock(channels // 2) for _ in range(section.istft_blocks[1]))
        self.norm = nn.LayerNorm(channels // 2)
        self.filters = nn.Linear(channels // 2, 3 * bins)
        with torch.no_grad():
            # Soft to begin with: a loud start would first have to be unlearned.
            self.filters.bias.copy_(torch.tensor([-3.0, 0.0, -5.0]).repeat_interleave(bins))
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)
        self._trunk: tuple[tuple, Trunk] | None = None

    def forward(self, frames: Tensor, mask: Mask = None, pitch: Tensor | None = None) -> Sound:
        """frames: [clips, model_in_dim, T]; pitch: Hz [clips, T], predicted when not given."""
        if self.training:
            x, expected = through(self._layers(), frames, mask)
        else:
            x, expected = self.trunk().whole(frames, mask)
        if pitch is None:
            pitch = stepped(expected.detach())
        # What makes phases and spectra is float32, whatever the layers before it are trained in.
        expected = expected.float()
        source, noise = pulses(_held(pitch, mask)), self._noise(pitch)
        if mask is not None:
            # Beyond its end a clip is silent, alone as in a batch.
            inside = mask[:, 0].repeat_interleave(FRAME, dim=1)
            source, noise = source * inside, noise * inside
        x = self.widened(x, pitch)
        mask = None if mask is None else mask.repeat_interleave(self.UP, dim=2)
        x = _masked(x, mask)
        for block in self.fast:
            x = block(x, mask)
        pieces = self.pieces(x, self._spectra(source), self._spectra(noise), mask)
        clips = len(x)
        weight = self.window.square()[None, :, None].expand(clips, -1, pieces.shape[2])
        sound, envelope = self._overlap(pieces), self._overlap(_masked(weight, mask))
        return Sound(self.levelled(sound, envelope), expected)

    def trunk(self) -> Trunk:
        """The layers from which the pitch comes, made anew when a weight has changed."""
        key = version(self)
        if self._trunk is None or self._trunk[0] != key:
            self._trunk = key, trunk(self._layers())
        return self._trunk[1]

    def _layers(self) -> Layers:
        return Layers(self.enter, self.slow, self.near_pitch, self.to_pitch)  # type: ignore[arg-type]

    def widened(self, x: Tensor, pitch: Tensor) -> Tensor:
        """[clips, channels, T] at 50 Hz with the pitch [clips, T] -> [clips, channels / 2, 4 T] at 200 Hz."""
        clips, _, length = x.shape
        x = self.up(x).view(clips, -1, self.UP, length).transpose(2, 3).reshape(clips, -1, length * self.UP)
        return x + self.from_pitch(octaves(pitch).float()[:, None]).repeat_interleave(self.UP, dim=2)

    def pieces(self, x: Tensor, source: Tensor, noise: Tensor, mask: Mask = None) -> Tensor:
        """Windows of sound [clips, window, n] from [clips, channels / 2, n] and complex spectra [clips, bins, n]."""
        filters = self.filters(self.norm(x.transpose(1, 2))).transpose(1, 2).float()
        loudness, phase, breath = filters.clamp(max=5.0).chunk(3, dim=1)
        voiced = source * torch.polar(torch.exp(loudness), phase)
        spectrum = _masked(voiced + noise * torch.exp(breath), mask)
        return torch.fft.irfft(spectrum, self.WINDOW, dim=1) * self.window[:, None]

    def _noise(self, pitch: Tensor) -> Tensor:
        """White noise [clips, 320 T]; out of training the same for every clip, so that it sounds the same each time."""
        clips, length = pitch.shape
        if self.training:
            return torch.randn(clips, length * FRAME, device=pitch.device)
        noise = torch.randn(length * FRAME, generator=noise_source())
        return noise.to(pitch.device).expand(clips, -1)

    def _spectra(self, wave: Tensor) -> Tensor:
        """[clips, samples] -> complex [clips, bins, samples / HOP], windows centred as `_overlap` lays them."""
        margin = (self.WINDOW - self.HOP) // 2
        return self.spectrum(F.pad(wave, (margin, margin)).unfold(1, self.WINDOW, self.HOP))

    def spectrum(self, windows: Tensor) -> Tensor:
        """[clips, n, window] -> complex [clips, bins, n]."""
        return torch.fft.rfft(windows * self.window, dim=2).transpose(1, 2)

    def summed(self, pieces: Tensor) -> Tensor:
        """Windowed pieces [clips, window, n] added at their places, [clips, (n - 1) HOP + window]."""
        size = (pieces.shape[2] - 1) * self.HOP + self.WINDOW
        return F.fold(pieces, (1, size), (1, self.WINDOW), stride=(1, self.HOP))[:, 0, 0]

    @staticmethod
    def levelled(sound: Tensor, envelope: Tensor) -> Tensor:
        """Sums of windowed pieces by the sum of the windows."""
        return torch.clamp(sound / envelope.clamp(min=1e-3), -1.0, 1.0)

    def _overlap(self, pieces: Tensor) -> Tensor:
        """`summed`, without what lies beyond the clip: [clips, n * HOP]."""
        margin = (self.WINDOW - self.HOP) // 2
        return self.summed(pieces)[:, margin : margin + pieces.shape[2] * self.HOP]


def _held(pitch: Tensor, mask: Mask) -> Tensor:
    """The last pitch of a clip carried on through its padding: samples lie between the pitches of two frames."""
    if mask is None:
        return pitch
    last = mask[:, 0].sum(1, keepdim=True).long() - 1
    return pitch.gather(1, torch.minimum(torch.arange(pitch.shape[1], device=pitch.device), last))


def stepped(expected: Tensor) -> Tensor:
    """Octaves above 200 Hz as Hz in steps, or differences in the last digit would add up over a clip's periods."""
    steps = torch.round(expected * _PITCH_STEPS) / _PITCH_STEPS
    return (_MIDDLE_PITCH * torch.exp2(steps)).clamp(LOWEST, HIGHEST)


def noise_source() -> torch.Generator:
    """Draws the noise of every clip, from its first sample on; drawn in whole frames, the pieces are the whole."""
    return torch.Generator().manual_seed(0)


def pulses(pitch: Tensor) -> Tensor:
    """A pulse in each period, made of all harmonics below 8 kHz, at unit power.

    pitch: Hz [clips, T] -> float32 [clips, 320 T].
    """
    middles = torch.cat([pitch[:, :1], pitch, pitch[:, -1:]], dim=1)
    hertz = glide(middles)[:, FRAME // 2 : -(FRAME // 2)]
    return pulses_at(torch.cumsum(hertz / SAMPLE_RATE, dim=1), hertz)


def glide(middles: Tensor) -> Tensor:
    """The samples between the middles of neighbouring frames, on straight lines.

    middles: Hz [clips, n + 1] -> float64 [clips, 320 n]. Each sample by the same operations wherever its frame lies, so
    that a steady pitch stays steady to the last digit: the number of harmonics jumps at whole divisors.
    """
    middles = middles.double()
    way = (torch.arange(FRAME, dtype=torch.float64, device=middles.device) + 0.5) / FRAME
    before, step = middles[:, :-1, None], middles.diff(dim=1)[:, :, None]
    return (before + step * way).flatten(1)


def pulses_at(phase: Tensor, hertz: Tensor) -> Tensor:
    """Value of the pulse train [clips, samples] at a phase in periods (float64, whole periods do not matter)."""
    # The sum of cos(2πkφ) over all harmonics k has a closed form, the Dirichlet kernel; so steep at a pulse that single
    # precision would show where φ was rounded.
    harmonics = torch.floor(SAMPLE_RATE / 2 / hertz)
    angle = torch.pi * (phase % 1.0)
    across = torch.sin(angle)
    at_pulse = across.abs() < 1e-4
    kernel = torch.sin((2 * harmonics + 1) * angle) / across.masked_fill(at_pulse, 1.0)
    return ((torch.where(at_pulse, 2 * harmonics + 1, kernel) - 1) / torch.sqrt(2 * harmonics)).float()
