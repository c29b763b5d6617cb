"""Figures of a running stage beyond its losses: use of the hardware, memory, perplexity, position in the data."""

import resource
import time
from pathlib import Path

import numpy as np
import torch

from speechgpt.training import hardware
from speechgpt.training.shape import Products
from speechgpt.training.validation import perplexity

_PROBE = 768
"""Rows and columns of the product that a CPU is measured with."""


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Operations a second that one worker could do at best; None if that is not known.

    A GPU's is the makers' figure for 16-bit precision (training/hardware.yaml), a CPU's is measured: the best of a few
    matrix products with as many threads as the worker has.
    """
    if device.type == "cpu":
        return _measured(precision)
    if precision is torch.float32 or device.type != "cuda":
        return None
    return hardware.peak_of(torch.cuda.get_device_name(device), hardware.load())


def _measured(precision: torch.dtype) -> float:
    left = torch.ones(_PROBE, _PROBE, dtype=precision)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - began)
    return 2 * _PROBE**3 / min(seconds)


class Gauges:
    """Adds to what the loop reports.

    products: of the model; peak: of one worker, as `peak_flops` gives it; tokens: of each block of the stage that is
    not padding, in the order they are read; per_step: blocks a step over all ranks.
    """

    def __init__(
        self,
        products: Products,
        peak: float | None,
        workers: int,
        tokens: np.ndarray,
        per_step: int,
        device: torch.device,
    ) -> None:
        self._products, self._device = products, device
        self._peak = peak * workers if peak else None
        self._tokens, self._per_step = np.cumsum(tokens, dtype=np.int64), per_step

    def read(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures with their `step`, and what can be said beside them."""
        read = dict(figures)
        for kind in ("text", "units"):
            if f"loss_{kind}" in figures:
                read[f"perplexity_{kind}"] = perplexity(figures[f"loss_{kind}"])
        if self._peak and "tokens_per_second" in figures:
            rate = self._products.flops(figures["tokens_per_second"], figures["targets_per_second"])
            read["mfu"] = rate / self._peak
        if blocks := int(figures["step"]) * self._per_step:
            read |= {"blocks_seen": float(blocks), "tokens_seen": float(self._tokens[blocks - 1])}
        read["memory_peak_gib"] = peak_memory(self._device) / hardware.GIB
        return read


def peak_memory(device: torch.device) -> int:
    """Bytes that this worker has had at most: of the GPU's memory, or resident on a machine without."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # Not Linux: macOS, which counts bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which a process takes over from the one that started it.
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
