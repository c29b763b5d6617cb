"""Float32 matrix products from bfloat16 ones, for processors that multiply those many times faster (Intel AMX).

A float32 is the sum of its rounding to bfloat16 and what that leaves, rounded again, to 2^-17. Of the four products of
two such sums the smallest is left away; the others are added in float32. So the result is as good as float32's to some
3e-6 of its size (float32 itself: 3e-7), at three bfloat16 products' price. oneMKL calls this way of computing bf16x3.

PyTorch has no product of bfloat16 matrices that keeps its float32 sums on a CPU (`torch.mm(out_dtype=…)` is for GPUs);
the oneMKL inside it has, `cblas_gemm_bf16bf16f32`.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112


@functools.cache
def _gemm() -> Callable[..., None] | None:
    """oneMKL's bfloat16 x bfloat16 + float32, if this PyTorch has it and this processor has AMX."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    try:
        gemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    number, real, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm.restype = None
    gemm.argtypes = [
        *(number, number, number, number, number, number),
        *(real, address, number, address, number, real, address, number),
    ]
    return gemm


def available() -> bool:
    return _gemm() is not None


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to two bfloat16 of the same shape, contiguous, whose sum it is."""
    high = x.bfloat16()
    return high.contiguous(), (x - high).bfloat16().contiguous()


class SplitWeight:
    """A matrix float32 [outputs, inputs] to multiply with, as `torch.nn.functional.linear` does."""

    def __init__(self, weight: Tensor) -> None:
        self._high, self._low = split(weight.detach().cpu())

    def add_product(self, sums: Tensor, high: Tensor, low: Tensor) -> None:
        """Adds x @ weight.T to sums, float32 [rows, outputs], contiguous.

        high, low: x, split, bfloat16 [rows, inputs]; the numbers of a row lie side by side. Raises ValueError for
        shapes that do not fit and rows that overlap, which oneMKL passes over.
        """
        gemm = _gemm()
        assert gemm is not None
        rows, inputs = high.shape
        outputs = len(self._high)
        if sums.shape != (rows, outputs) or not sums.is_contiguous() or inputs != self._high.shape[1]:
            raise ValueError(f"[{rows}, {inputs}] x {list(self._high.shape)} does not go into {list(sums.shape)}")
        if any(x.stride(1) != 1 or (rows > 1 and x.stride(0) < inputs) for x in (high, low)):
            raise ValueError("rows of the factor overlap, or their numbers lie apart")
        with record_function("bf16x3 product"):
            for x, weight in ((high, self._low), (low, self._high), (high, self._high)):
                gemm(
                    *(_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED, rows, outputs, inputs),
                    *(1.0, x.data_ptr(), max(x.stride(0), inputs), weight.data_ptr(), inputs),
                    *(1.0, sums.data_ptr(), outputs),
                )


class SplitLinear(nn.Module):
    """An `nn.Linear` with its weights as they are now, without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = SplitWeight(linear.weight)
        outputs = linear.out_features
        self._bias = torch.zeros(outputs) if linear.bias is None else linear.bias.detach().float().clone()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., inputs] to [..., outputs]."""
        sums = self._bias.repeat(*x.shape[:-1], 1)
        self._weight.add_product(sums.flatten(0, -2), *(part.flatten(0, -2) for part in split(x)))
        return sums
