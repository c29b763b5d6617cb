from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.vocoder import UnitVocoder, Vocoder


@pytest.fixture(scope="session")
def random_vocoder() -> Callable[..., Vocoder]:
    """A vocoder of 50 units with random weights, of the size that carries a signal through all layers."""

    def make(section: GeneratorSection, centroid_dimensions: int = 0) -> Vocoder:
        torch.manual_seed(0)
        model = UnitVocoder(section, 50, centroid_dimensions)
        convolutions = nn.Conv1d | nn.ConvTranspose1d
        with torch.no_grad():
            for module in model.generator.modules():
                if isinstance(module, convolutions):
                    fan_in = module.weight[0].numel() / (module.stride[0] if module.transposed else 1)
                    weight = torch.randn(module.weight.shape) * (0.8 / fan_in**0.5)
                    module.weight = weight if is_parametrized(module) else nn.Parameter(weight)
                    module.bias.normal_(std=0.02)
            if section.head == "istft":
                model.generator.filters.weight.normal_(std=0.1)
            if model.dur_predictor is not None:
                model.dur_predictor.proj.bias.fill_(1.2)
        return Vocoder(model)

    return make
