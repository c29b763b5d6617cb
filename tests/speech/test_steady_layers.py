"""Pieces give what the whole does, to the last bit; where they would not, layers compute in double precision."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechgpt.speech import steady_layers
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.durations import DurationPredictor, durations
from speechgpt.speech.generators import IstftGenerator
from speechgpt.speech.pitch_trunk import Trunk, through, trunk

_SHIPPED = GeneratorSection(head="istft", embedding_dim=256, model_in_dim=256)


@pytest.fixture(scope="module")
def generator() -> IstftGenerator:
    torch.manual_seed(1)
    return IstftGenerator(_SHIPPED).eval()


@pytest.fixture(scope="module")
def predictor() -> DurationPredictor:
    torch.manual_seed(2)
    return DurationPredictor(256).eval()


@pytest.fixture(params=["single", "double"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == "double":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        return torch.float64
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(steady_layers, "_holds", lambda _made: True)
    return torch.float32


def _in_pieces(made: steady_layers.Steady, x: Tensor, sizes: list[int]) -> list[Tensor]:
    stream, results, start = made.stream(), [], 0
    for size in sizes:
        results.append(stream.push(x[:, :, start : start + size], last=False))
        start += size
    results.append(stream.push(x[:, :, start:], last=True))
    return [torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), max_size=12), rest=st.integers(1, 40), seed=st.integers(0, 2**20))
@torch.inference_mode()
def test_pieces_are_the_whole_whatever_was_chosen(
    generator: IstftGenerator, predictor: DurationPredictor, sizes: list[int], rest: int, seed: int
) -> None:
    """To the last bit in single precision, which was tried with few pieces."""
    x = torch.randn(1, 256, sum(sizes) + rest, generator=torch.Generator().manual_seed(seed))
    for made in (generator.trunk(), durations(predictor)):
        for joined, whole in zip(_in_pieces(made, x, sizes), made.stream().push(x, last=True), strict=True):
            rounded = 1e-12 if whole.dtype == torch.float64 else 1e-6
            allowed = 0 if made.dtype == torch.float32 else rounded
            torch.testing.assert_close(joined, whole, atol=allowed, rtol=0)


@torch.inference_mode()
def test_they_are_the_layers_that_were_trained(
    generator: IstftGenerator, predictor: DurationPredictor, precision: torch.dtype
) -> None:
    x, mask = torch.randn(3, 256, 50), (torch.arange(50) < torch.tensor([[50], [1], [17]]))[:, None].float()
    layers = generator._layers()
    made = trunk(layers)
    assert made.dtype == precision
    for given_, wanted in zip(made.whole(x, mask), through(layers, x * mask, mask), strict=True):
        inside = mask if given_.dim() == 3 else mask[:, 0]
        torch.testing.assert_close(given_ * inside, wanted * inside, atol=2e-5, rtol=1e-4, check_dtype=False)
    [predicted] = durations(predictor).stream().push(x[:1], last=True)
    wanted = predictor(x[:1].transpose(1, 2), torch.ones(1, 50))[0]
    torch.testing.assert_close(predicted, wanted, atol=1e-5, rtol=1e-4, check_dtype=False)


@torch.inference_mode()
def test_in_double_precision_pieces_are_the_whole_far_below_a_step(
    generator: IstftGenerator, predictor: DurationPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x = torch.randn(1, 256, 90)
    for made in (trunk(generator._layers()), durations(predictor)):
        assert made.dtype == torch.float64
        joined, whole = _in_pieces(made, x, [1, 20, 3])[-1], made.stream().push(x, last=True)[-1]
        torch.testing.assert_close(joined, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steady", [True, False])
def test_what_depends_on_its_piece_is_found_out(steady: bool) -> None:
    class Layer:
        inputs = 4

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def stream(self) -> "Layer":
            return self

        def push(self, x: Tensor, last: bool) -> tuple[Tensor, ...]:
            return (x if steady else x + 1e-7 * x.shape[2],)

    make: Callable[[torch.dtype], Layer] = Layer
    found = steady_layers.steady(make, torch.device("cpu")).dtype
    assert found == (torch.float32 if steady and torch.backends.mkldnn.is_available() else torch.float64)


def test_the_trunk_follows_the_weights(generator: IstftGenerator) -> None:
    before = generator.trunk()
    assert isinstance(before, Trunk) and generator.trunk() is before
    with torch.no_grad():
        generator.to_pitch.bias += 1
    assert generator.trunk() is not before
    with torch.no_grad():
        generator.to_pitch.bias -= 1
