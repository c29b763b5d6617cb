"""Products with packed weights against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from speechgpt.speech.packed_products import PackedLinear, PackedWeight, multiplies_bfloat16

_TYPES = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]


def _close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(given, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("packs", [True, False], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("shape", [(1, 3), (7, 16), (2, 65, 16)])
def test_a_layer_is_the_same_layer(
    shape: tuple[int, ...], dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: packs)
    torch.manual_seed(1)
    linear, x = nn.Linear(shape[-1], 24, dtype=dtype), torch.randn(*shape, dtype=dtype)
    with torch.inference_mode():
        packed = PackedLinear(linear)
        _close(packed(x), linear(x))
        before = packed(x)
        linear.weight.zero_()
        assert torch.equal(packed(x), before)


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("step", [8, 12, 5], ids=["side by side", "apart", "overlapping"])
def test_rows_lie_as_they_like(dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(1)
    weight, sums = torch.randn(24, 8, dtype=dtype), torch.randn(30, 24, dtype=dtype)
    rows = torch.randn(30 * 12, dtype=dtype).as_strided((30, 8), (step, 1))
    with torch.inference_mode():
        packed = PackedWeight(weight)
        _close(packed.product(rows, None), F.linear(rows, weight))
        _close(packed.add_product(rows, sums.clone()), sums + F.linear(rows, weight))
