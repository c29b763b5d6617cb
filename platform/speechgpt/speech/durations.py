"""How long each unit lasts: the predictor (SPEC 4.3), its layers for inference in pieces, and rounding to frames."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechgpt.speech.steady_layers import Convolution, Product, steady
from speechgpt.speech.stream_layers import RowsStream


class DurationPredictor(nn.Module):
    """log(duration + 1) of each merged unit, from its embedding and two neighbours each side (SPEC 4.3)."""

    def __init__(self, channels: int, kernel: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2), nn.ReLU())
        self.ln1 = nn.LayerNorm(channels)
        self.conv2 = nn.Sequential(nn.Conv1d(channels, channels, kernel, padding=1), nn.ReLU())
        self.ln2 = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """embedded: [clips, units, channels]; mask: [clips, units], 1 inside. Returns [clips, units]."""
        x = embedded * mask[..., None]
        for convolution, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = self.dropout(norm(convolution(x.transpose(1, 2)).transpose(1, 2))) * mask[..., None]
        return self.proj(x).squeeze(-1)


def durations(predictor: DurationPredictor) -> "Durations":
    """The predictor with its weights as they are now."""
    return steady(lambda dtype: Durations(predictor, dtype), predictor.proj.weight.device)


class Durations:
    """For inference; see `steady_layers`."""

    def __init__(self, predictor: DurationPredictor, dtype: torch.dtype) -> None:
        self.inputs, self.dtype = predictor.proj.in_features, dtype
        self.convolutions = [
            Convolution(each[0], dtype)  # type: ignore[arg-type]
            for each in (predictor.conv1, predictor.conv2)
        ]
        self.norms = [copy.deepcopy(each).to(dtype) for each in (predictor.ln1, predictor.ln2)]
        self.leave = Product(predictor.proj.weight, predictor.proj.bias, dtype)

    def stream(self) -> "DurationStream":
        return DurationStream(self)


class DurationStream:
    """One clip: each unit's duration once the two after it are there."""

    def __init__(self, layers: Durations) -> None:
        self._layers = layers
        self._convolutions = [RowsStream(each) for each in layers.convolutions]

    def push(self, embedded: Tensor, last: bool) -> tuple[Tensor]:
        """embedded: [1, channels, n] -> log(duration + 1) of the units that follow, float64 [m]."""
        x = embedded[0].T.to(self._layers.dtype)
        for convolution, norm in zip(self._convolutions, self._layers.norms, strict=True):
            x = norm(F.relu(convolution.push(x, last)))
        return (self._layers.leave(x)[:, 0].double(),)


class Rounding:
    """Whole frames of one clip's units, at least one each, from log(duration + 1); in pieces as at once."""

    def __init__(self, running: bool) -> None:
        """running: see `GeneratorSection.rounding`."""
        self._running = running
        self._exact = torch.zeros(1, dtype=torch.float64)
        self._end = 0

    def push(self, predicted: Tensor) -> Tensor:
        """predicted: float64 [n] of the next units. Returns int64 [n], on the CPU."""
        lengths = torch.exp(predicted.cpu()) - 1
        if not self._running:
            return torch.clamp(torch.round(lengths), min=1).long()
        exact = torch.cat([self._exact, lengths.clamp(min=0)]).cumsum(0)
        order = torch.arange(len(exact))
        # What lies beyond one frame a unit never shrinks, so that each end is a frame at least behind the one before.
        beyond = torch.cat([torch.tensor([self._end]), torch.round(exact[1:]).long() - order[1:]])
        ends = beyond.cummax(0).values + order
        self._exact, self._end = exact[-1:], int(ends[-1])
        return ends.diff()
