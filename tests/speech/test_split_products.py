"""Products of float32 matrices made of bfloat16 ones, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from speechgpt.speech.split_products import SplitLinear, SplitWeight, available, split

pytestmark = pytest.mark.skipif(not available(), reason="no AMX or no oneMKL here")


def test_a_number_is_the_sum_of_its_parts() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    high, low = split(x)
    assert ((high.double() + low.double() - x).abs() <= x.abs() * 2**-16).all()


@given(rows=st.integers(1, 70), inputs=st.integers(1, 90), outputs=st.integers(1, 80), bias=st.booleans())
def test_a_layer_is_float32_to_2_in_100_000(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows * inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias)
    x = torch.randn(2, rows, inputs)
    with torch.inference_mode():
        exact = linear.double()(x.double())
        layer = SplitLinear(linear.float())
        given = layer(x)
        terms = x.double().abs() @ linear.weight.double().abs().T
    assert torch.equal(given, layer(x)), "a second time it is another"
    assert given.dtype == torch.float32 and given.shape == (2, rows, outputs)
    assert ((given - exact).abs() <= 2**-15 * terms + 1e-7).all()


def test_rows_may_lie_apart_but_not_overlap() -> None:
    """oneMKL refuses those, with no more than a line on standard output."""
    x, weight = torch.randn(8, 20), torch.randn(7, 10)
    sums = torch.ones(8, 7)
    high, low = split(x)
    SplitWeight(weight).add_product(sums, high[:, 5:15], low[:, 5:15])
    torch.testing.assert_close(sums, 1 + x[:, 5:15] @ weight.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="overlap"):
        SplitWeight(weight).add_product(sums, *(part.flatten().unfold(0, 10, 4)[:8] for part in (high, low)))
