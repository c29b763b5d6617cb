"""Discriminators of the vocoder's adversarial training: HiFi-GAN's (SPEC 4.4), and light ones for CPUs.

Each discriminator takes samples [clips, n] and returns its score and the feature maps before it.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Judgement = tuple[Tensor, list[Tensor]]


class PeriodDiscriminator(nn.Module):
    """Looks at every p-th sample: Conv2d 1→32→128→512→1024→1024→1 over [n / p, p]."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, 32, 128, 512, 1024)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.layers.append(weight_norm(nn.Conv2d(1024, 1024, (5, 1), padding=(2, 0))))
        self.score = weight_norm(nn.Conv2d(1024, 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> Judgement:
        missing = -wave.shape[1] % self.period
        x = F.pad(wave[:, None], (0, missing), mode="reflect").unflatten(2, (-1, self.period))
        return _through(self.layers, self.score, x, 0.1)


class ScaleDiscriminator(nn.Module):
    """Grouped one-dimensional convolutions over the samples."""

    _LAYERS = (
        (1, 128, 15, 1, 1),
        (128, 128, 41, 2, 4),
        (128, 256, 41, 2, 16),
        (256, 512, 41, 4, 16),
        (512, 1024, 41, 4, 16),
        (1024, 1024, 41, 1, 16),
        (1024, 1024, 5, 1, 1),
    )

    def __init__(self, spectral: bool) -> None:
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(a, b, k, stride, k // 2, groups=groups)) for a, b, k, stride, groups in self._LAYERS
        )
        self.score = norm(nn.Conv1d(1024, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> Judgement:
        return _through(self.layers, self.score, wave[:, None], 0.1)


class SpectrogramDiscriminator(nn.Module):
    """Looks at a complex spectrogram, its magnitudes compressed."""

    window: Tensor

    def __init__(self, size: int, width: int = 16) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(
            weight_norm(layer)
            for layer in (
                nn.Conv2d(2, width, (7, 5), (2, 1), (3, 2)),
                nn.Conv2d(width, width, (5, 3), (2, 1), (2, 1)),
                nn.Conv2d(width, 2 * width, (5, 3), (2, 2), (2, 1)),
                nn.Conv2d(2 * width, 2 * width, (3, 3), (2, 1), (1, 1)),
            )
        )
        self.score = weight_norm(nn.Conv2d(2 * width, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(size), persistent=False)

    def forward(self, wave: Tensor) -> Judgement:
        spectrum = torch.stft(wave, self.size, self.size // 4, window=self.window, return_complex=True)
        compressed = spectrum / (spectrum.abs().square() + 1e-7).pow(0.35)
        return _through(self.layers, self.score, torch.stack([compressed.real, compressed.imag], dim=1), 0.2)


class Discriminators(nn.Module):
    """`hifigan`: five periods and three scales; `stft`: three spectrogram sizes."""

    def __init__(self, kind: Literal["hifigan", "stft"]) -> None:
        super().__init__()
        self.scales = 3 if kind == "hifigan" else 0
        if kind == "hifigan":
            judges: list[nn.Module] = [PeriodDiscriminator(p) for p in (2, 3, 5, 7, 11)]
            judges += [ScaleDiscriminator(spectral=i == 0) for i in range(self.scales)]
        else:
            judges = [SpectrogramDiscriminator(size) for size in (1024, 512, 256)]
        self.judges = nn.ModuleList(judges)

    def forward(self, wave: Tensor) -> list[Judgement]:
        """wave: [clips, samples]."""
        results = []
        for index, judge in enumerate(self.judges):
            scale = index - (len(self.judges) - self.scales) if self.scales else 0
            heard = wave[:, None]
            for _ in range(max(scale, 0)):
                heard = F.avg_pool1d(heard, 4, 2, padding=2)
            results.append(judge(heard[:, 0]))
        return results


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Least squares: sum of mean((1 - D(y))²) + mean(D(ŷ)²)."""
    return torch.stack(
        [(1 - r).square().mean() + f.square().mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    ).sum()


def adversarial_loss(fake: list[Judgement]) -> Tensor:
    """Sum of mean((1 - D(ŷ))²)."""
    return torch.stack([(1 - score).square().mean() for score, _ in fake]).sum()


def feature_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Sum over layers of mean |difference| of the feature maps."""
    pairs = [(a, b) for (_, r), (_, f) in zip(real, fake, strict=True) for a, b in zip(r, f, strict=True)]
    return torch.stack([F.l1_loss(b, a.detach()) for a, b in pairs]).sum()


def _through(layers: nn.ModuleList, score: nn.Module, x: Tensor, slope: float) -> Judgement:
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), slope)
        features.append(x)
    return score(x), features
