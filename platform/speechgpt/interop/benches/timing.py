"""What the benchmarks measure with: clocks, the arithmetic of a model, and what the processor can do of it at best."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass
class Taken:
    """Seconds by the clock on the wall and by the processor's own (of all threads of the process)."""

    wall: float = 0.0
    processor: float = 0.0

    def add(self, wall: float, processor: float) -> None:
        self.wall += wall
        self.processor += processor

    def measure(self, work: Callable[[], T]) -> T:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        self.add(time.perf_counter() - wall, time.process_time() - processor)
        return result


def operations(work: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions; a multiplication with its addition is two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def peak(dtype: "torch.dtype", repeats: int = 8) -> float:
    """The most operations in a processor-second that a large matrix product reaches here, with torch's threads."""
    import torch

    one, other = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        taken = Taken()
        taken.measure(lambda: one @ other)
        best = max(best, 2 * 1536**3 / taken.processor)
    return best


def profile(work: Callable[[], Any], rows: int = 6) -> dict[str, float]:
    """Share of the time in each kind of operation, the largest first; the rest under `others`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    work()
    with profiled(activities=[ProfilerActivity.CPU]) as found:
        work()
    return shares(found, rows)


def shares(found: Any, rows: int = 6) -> dict[str, float]:
    """Of a finished torch profiler: the share of the time in each kind of operation, the largest first."""
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) or 1
    largest = {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:rows]}
    return {**largest, "others": round(1 - sum(largest.values()), 3)}
