"""One global batch for any number of workers: what changes with the workers is only how often each accumulates."""

import math

from speechgpt.training.config import EngineSection, StageSection


def blocks_a_step(stage: StageSection, engine: EngineSection) -> int:
    """Blocks of one optimiser step over all workers; the same while the number of workers changes."""
    return stage.micro_batch * stage.accumulation * engine.most_workers


def for_workers(stage: StageSection, engine: EngineSection, workers: int) -> StageSection:
    """The stage as each of `workers` runs it: `accumulation` such that a step has as many blocks as ever.

    Raises ValueError if the step's blocks do not fall evenly on them.
    """
    micro_batches, rest = divmod(stage.accumulation * engine.most_workers, workers)
    if rest:
        raise ValueError(f"{misfit(stage, engine)} ({workers} workers came)")
    return stage.model_copy(update={"accumulation": micro_batches})


def misfit(stage: StageSection, engine: EngineSection) -> str:
    """Why a step's blocks do not fall evenly on every number of workers that `engine.workers` allows; empty if they do.

    The text names what would.
    """
    sizes = range(engine.least_workers, engine.most_workers + 1)
    micro_batches = stage.accumulation * engine.most_workers
    uneven = [size for size in sizes if micro_batches % size]
    if not uneven:
        return ""
    unit = math.lcm(*sizes) // engine.most_workers
    fitting = unit * math.ceil(stage.accumulation / unit)
    least = next(start for start in sizes if not any(micro_batches % size for size in range(start, sizes.stop)))
    return (
        f"a step of {blocks_a_step(stage, engine)} blocks is {micro_batches} micro-batches of {stage.micro_batch} "
        f"(accumulation {stage.accumulation} on {engine.most_workers} workers), which do not fall evenly on "
        f"{_listed(uneven)} workers of engine.workers [{engine.least_workers}, {engine.most_workers}]; "
        f"accumulation {fitting} would, and so would engine.workers [{least}, {engine.most_workers}]"
    )


def _listed(sizes: list[int]) -> str:
    shown = [str(size) for size in sizes[:6]]
    return ", ".join(shown) + (" …" if len(sizes) > len(shown) else "")
