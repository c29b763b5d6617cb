"""Matrix products with weights that are laid out once, as oneDNN reads them.

PyTorch's own products lay bfloat16 weights out anew at every call, and take float32 to oneMKL, which on processors of
AMD makes 94 to 102 of 110 billion sums a second (one core of an EPYC with AVX-512, shapes of HuBERT Base).
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Precision = Literal["float32", "bfloat16"]

_ROWS = 1024
"""Of the products that the layout is chosen for; it suits others as well."""


def multiplies_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 on this processor: with AVX-512, or AVX-NE-CONVERT."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedWeight:
    """A matrix [outputs, inputs] as it is now, to multiply with. Plain where oneDNN cannot take it."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())
        self.packs = known and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        # Outside inference mode: a tensor made in it cannot be packed.
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.clone(memory_format=torch.contiguous_format)
            self.numbers = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self.packs else weight

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`torch.nn.functional.linear` [..., inputs] -> [..., outputs], without gradients."""
        if not self.packs:
            return F.linear(x, self.numbers, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.numbers, bias, "none", [], "")

    def add_product(self, x: Tensor, sums: Tensor) -> Tensor:
        """The product of x [rows, inputs] and `sums` [rows, outputs], added up."""
        if not self.packs:
            return torch.addmm(sums, x, self.numbers.T)
        return torch.ops.mkldnn._linear_pointwise.binary(x, sums, self.numbers, None, "add")


class PackedLinear(nn.Module):
    """An `nn.Linear` with its weights as they are now, without gradients. It can be traced."""

    weight: Tensor
    """Shape and type, which PEFT and transformers ask for; without numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, device="meta"), persistent=False)
        self._weight = PackedWeight(linear.weight)
        # A graph cannot hold a packed tensor as a number of its own, only as a part of a module.
        self.register_buffer("_numbers", self._weight.numbers, persistent=False)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() and self._weight.packs:
            return _traceable_product()(x, self._numbers, self._bias)
        return self._weight.product(x, self._bias)


@cache
def _traceable_product() -> Any:
    """oneDNN's product as a graph has it: tracing knows no empty list of numbers, TorchScript does."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(product)


def exchange_linears(module: nn.Module, kind: Callable[[nn.Linear], nn.Module] = PackedLinear) -> None:
    """Put what `kind` makes of it in the place of every `nn.Linear` in a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            exchange_linears(child, kind)
