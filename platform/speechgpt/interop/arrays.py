"""numpy arrays and torch tensors out of a pickle's own words, every size checked against the bytes that are there."""

import math
import re
from typing import Any

import numpy as np
import torch

from speechgpt.interop.pickles import PickleError, RefusedError, Unbuilt
from speechgpt.interop.source import Source

_PLAIN_TYPE = re.compile(r"[<>|=]?(b1|[biuf][1248]|f16|c(8|16|32)|[SU]\d{1,6})")


class ArrayType(Unbuilt):
    """A numpy type of numbers or text; its state brings the byte order."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = True) -> None:
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            raise RefusedError(f"numpy arrays of type {code!r:.40}: only plain numbers and text are read")
        self.numpy = np.dtype(code)

    def build(self, state: Any, source: Source) -> "ArrayType":
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise PickleError(f"damaged: a byte order {order!r:.20}")
        made = ArrayType(self.numpy.str[1:])
        made.numpy = self.numpy if order in "|=" else self.numpy.newbyteorder(order)
        return made


class Array(Unbuilt):
    """numpy's `_reconstruct`: an array that its state fills."""

    def __init__(self, *_arguments: Any) -> None: ...

    def build(self, state: Any, source: Source) -> np.ndarray:
        _version, shape, kind, fortran, data = state
        return array(data, kind, shape, "F" if fortran else "C")


class FollowingArray(Unbuilt):
    """joblib's array, whose bytes stand in the file after its description."""

    def __init__(self, *_arguments: Any) -> None: ...

    def build(self, state: Any, source: Source) -> np.ndarray:
        if state.get("numpy_array_alignment_bytes") is not None:
            source.take(source.take(1)[0])
        kind, shape = state["dtype"], state["shape"]
        data = source.take(_count(shape) * _numpy(kind).itemsize)
        return array(data, kind, shape, state["order"])


def array(data: Any, kind: Any, shape: Any, order: str = "C") -> np.ndarray:
    """An array of a buffer (Python 2 wrote text in place of bytes). Raises PickleError where they do not fit."""
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise RefusedError("a numpy array of Python objects")
    dtype, count = _numpy(kind), _count(shape)
    if len(data) != count * dtype.itemsize:
        raise PickleError(f"damaged: an array {shape} of {dtype} with {len(data)} bytes")
    flat = np.frombuffer(data, dtype, count).copy()
    return flat.reshape(shape[::-1]).T if order == "F" else flat.reshape(shape)


def from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """numpy's `_frombuffer`."""
    return array(data, kind, shape, order)


def scalar(kind: Any, data: Any = b"") -> Any:
    """numpy's `scalar`, as a Python number."""
    return array(data, kind, ()).item()


def _numpy(kind: Any) -> np.dtype:
    if not isinstance(kind, ArrayType):
        raise PickleError(f"damaged: {type(kind).__name__} for the type of an array")
    return kind.numpy


def _count(shape: Any) -> int:
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise PickleError(f"damaged: {shape!r:.60} for the shape of an array")
    return math.prod(shape)


STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}


class Storage:
    """Numbers of one type in the file; tensors are views of it, and nothing is copied."""

    def __init__(self, dtype: torch.dtype, count: int, data: memoryview | None) -> None:
        if data is not None and len(data) != count * dtype.itemsize:
            raise PickleError(f"damaged: a storage of {count} {dtype} with {len(data)} bytes")
        self.dtype, self.count, self.data = dtype, count, data

    def view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor | None:
        """None where the data's place is not known yet. Raises PickleError for a view that leaves the storage."""
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
            raise PickleError(f"damaged: a tensor of size {size!r:.60}, stride {stride!r:.60}")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and (last >= self.count or count > self.count):
            raise PickleError(f"damaged: a tensor {tuple(size)} in a storage of {self.count}")
        if self.data is None:
            return None
        if not count:
            return torch.empty(size, dtype=self.dtype)
        return torch.frombuffer(self.data, dtype=self.dtype, count=self.count).as_strided(size, stride, offset)


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_gradients_hooks_metadata: Any) -> torch.Tensor | None:
    """torch's `_rebuild_tensor_v2`. Whether it wants gradients, and hooks (there are none in files), plays no part."""
    if not isinstance(storage, Storage):
        raise PickleError("damaged: a tensor without a storage")
    return storage.view(offset, tuple(size), tuple(stride))


def parameter(data: Any, *_gradients_hooks: Any) -> Any:
    """torch's `_rebuild_parameter`."""
    return data
