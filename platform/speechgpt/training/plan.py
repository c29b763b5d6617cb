"""What a stage takes on given machines: memory, tokens, hours, money, storage; what to change where it cannot fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from speechgpt.training import memory, row_attention
from speechgpt.training.config import EngineSection, LoraSection, Offload, StageSection
from speechgpt.training.hardware import GIB, HardwareSection, Machines
from speechgpt.training.memory import Footprint
from speechgpt.training.shape import Kept, Shape, kept, measure

_MOST_MACHINES = 1024
Move = tuple[str, dict[str, Any], dict[str, Any]]
"""A change in words, and what it sets in the engine's and in the stage's section."""


class Sizes:
    """Shapes of one model, each measured once."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        self._shapes: dict[str, Shape] = {}
        self._kept: dict[tuple, Kept] = {}

    def shape(self, lora: LoraSection | None) -> Shape:
        key = repr(lora)
        if key not in self._shapes:
            self._shapes[key] = measure(self._config, lora)
        return self._shapes[key]

    def kept(self, lora: LoraSection | None, engine: EngineSection, micro_batch: int, block: int) -> Kept:
        masked = engine.gpus_per_worker > 0 or not row_attention.fits(self._config)
        key = (repr(lora), engine.precision, block, masked)
        if key not in self._kept:
            self._kept[key] = kept(self._config, lora, memory.dtype(engine), 1, block, masked=masked)
        # Everything kept has a batch dimension.
        return Kept(*(micro_batch * part for part in self._kept[key]))


class Setting(NamedTuple):
    """How a stage would run: what a change is a change of."""

    engine: EngineSection
    stage: StageSection
    machines: Machines


@dataclass(frozen=True)
class StagePlan:
    """All bytes are of one worker unless they say otherwise; hours are of the whole stage on all machines."""

    stage: str
    shape: Shape
    setting: Setting
    footprint: Footprint
    host_bytes: int
    """Of one node's host."""
    disk_bytes: int
    """Of one node's disk under `engine.nvme_path`."""
    fits: bool
    why_not: str
    remedy: str
    """The smallest change with which it would fit; empty if it fits, or if nothing helps."""
    grid: dict[str, int]
    """{`zero-2 checkpointing offload`: bytes at the fullest moment} for every way to run it on these machines."""
    deepspeed: dict[str, tuple[int, int]]
    """{`zero-2`: (GPU, host of a node)} of the model states by DeepSpeed's estimators, where they apply."""
    tokens: int
    hours: float
    cost: float
    checkpoint_bytes: int
    kept_bytes: int
    """Of all checkpoints that stay."""
    model_bytes: int


def plan(
    name: str, sizes: Sizes, engine: EngineSection, stage: StageSection, machines: Machines, table: HardwareSection
) -> StagePlan:
    """The stage as its recipe has it, on these machines: the global batch stays, accumulation follows their number."""
    setting = on_machines(engine, stage, machines)
    shape = sizes.shape(stage.lora)
    tokens = stage.steps * stage.block * setting.stage.micro_batch * setting.stage.accumulation * machines.number
    footprint = _footprint(sizes, setting)
    why_not = problem(sizes, setting, table)
    speed = machines.number * machines.kind.tflops * 1e12 * table.mfu
    if engine.gradient_checkpointing:
        speed *= table.checkpointing_speed
    hours = shape.products.flops(tokens, tokens) / speed / 3600
    checkpoint = memory.checkpoint_bytes(shape, setting.engine)
    return StagePlan(
        stage=name,
        shape=shape,
        setting=setting,
        footprint=footprint,
        host_bytes=_host(shape, setting),
        disk_bytes=_disk(shape, setting),
        fits=not why_not,
        why_not=why_not,
        remedy=remedy(sizes, setting, table) if why_not else "",
        grid={words: _footprint(sizes, other).peak for words, other in _ways(setting)},
        deepspeed=dict(_estimates(shape, setting)),
        tokens=tokens,
        hours=hours,
        cost=hours * machines.number * machines.kind.per_hour,
        checkpoint_bytes=checkpoint,
        kept_bytes=checkpoint * stage.keep,
        model_bytes=memory.model_bytes(shape, setting.engine, stage),
    )


def on_machines(engine: EngineSection, stage: StageSection, machines: Machines) -> Setting:
    """One worker a GPU (or core); accumulation so that a step has as many blocks as the recipe's, or the next more."""
    blocks = stage.micro_batch * stage.accumulation * engine.most_workers
    accumulation = max(1, -(-blocks // (stage.micro_batch * machines.number)))
    workers = {"workers": machines.number, "gpus_per_worker": float(machines.gpu)}
    return Setting(engine.model_copy(update=workers), stage.model_copy(update={"accumulation": accumulation}), machines)


def problem(sizes: Sizes, setting: Setting, table: HardwareSection) -> str:
    """Why a setting cannot run; empty if it can."""
    machines = setting.machines
    needed, usable = _footprint(sizes, setting).peak, machines.usable_bytes(table)
    if needed > usable:
        return (
            f"a worker needs {needed / GIB:.1f} GiB of the {usable / GIB:.1f} that {machines.name} has for its tensors"
        )
    host = _host(sizes.shape(setting.stage.lora), setting)
    if machines.gpu and host > machines.kind.node_memory_gib * GIB:
        return f"a node's host needs {host / GIB:.0f} GiB of its {machines.kind.node_memory_gib:.0f}"
    disk = _disk(sizes.shape(setting.stage.lora), setting)
    if disk > machines.kind.node_disk_gib * GIB:
        return f"a node's disk needs {disk / GIB:.0f} GiB of its {machines.kind.node_disk_gib:.0f}"
    return ""


def remedy(sizes: Sizes, setting: Setting, table: HardwareSection) -> str:
    """The fewest changes with which it fits, more machines last; empty if even `_MOST_MACHINES` do not help."""
    count = setting.machines.number
    while count <= _MOST_MACHINES:
        more = on_machines(setting.engine, setting.stage, setting.machines._replace(number=count))
        words = [] if count == setting.machines.number else [f"{count} × {setting.machines.name}"]
        for changes, changed in _changes(more):
            if not problem(sizes, changed, table):
                return " and ".join([*changes, *words])
        count *= 2
    return ""


def _changes(setting: Setting) -> Iterator[tuple[list[str], Setting]]:
    """Every combination of changes, the fewest first; among as many, what costs least speed first."""
    engine, stage, _ = setting
    moves: list[list[Move]] = [
        [(f"engine.zero_stage={zero}", {"zero_stage": zero}, {}) for zero in range(engine.zero_stage + 1, 4)],
        [] if engine.gradient_checkpointing else [_CHECKPOINTING],
        list(_smaller_batches(stage)),
        list(_offloads(engine)),
    ]
    for size in range(len(moves) + 1):
        for groups in itertools.combinations(moves, size):
            for chosen in itertools.product(*groups):
                changed = setting
                for _, of_engine, of_stage in chosen:
                    changed = changed._replace(
                        engine=changed.engine.model_copy(update=of_engine),
                        stage=changed.stage.model_copy(update=of_stage),
                    )
                if _may_be(changed.engine.offload, changed.engine.zero_stage):
                    yield [words for words, _, _ in chosen], changed


_CHECKPOINTING: Move = (
    "engine.gradient_checkpointing=true",
    {"gradient_checkpointing": True},
    {},
)


def _smaller_batches(stage: StageSection) -> Iterator[Move]:
    size, blocks = stage.micro_batch // 2, stage.micro_batch * stage.accumulation
    while size:
        yield f"micro_batch={size}", {}, {"micro_batch": size, "accumulation": -(-blocks // size)}
        size //= 2


def _offloads(engine: EngineSection) -> Iterator[Move]:
    if engine.offload == "none" and engine.gpus_per_worker:
        yield "engine.offload=cpu", {"offload": "cpu"}, {}
        yield "engine.offload=nvme engine.nvme_path=DIRECTORY", {"offload": "nvme"}, {}


def _may_be(offload: Offload, zero: int) -> bool:
    return zero >= {"none": 0, "cpu": 1, "nvme": 3}[offload]


def _ways(setting: Setting) -> Iterator[tuple[str, Setting]]:
    offloads: tuple[Offload, ...] = ("none", "cpu", "nvme") if setting.machines.gpu else ("none",)
    for zero, checkpointing, offload in itertools.product((0, 1, 2, 3), (False, True), offloads):
        # What fits without a disk needs none: on the GPU both offloads leave the same.
        if not _may_be(offload, zero) or (offload == "nvme" and setting.engine.offload != "nvme"):
            continue
        update = {"zero_stage": zero, "gradient_checkpointing": checkpointing, "offload": offload}
        place = {"none": "", "cpu": " offload", "nvme": " nvme"}[offload]
        words = f"zero-{zero}" + " checkpointing" * checkpointing + place
        yield words, setting._replace(engine=setting.engine.model_copy(update=update))


def _footprint(sizes: Sizes, setting: Setting) -> Footprint:
    engine, stage, machines = setting
    kept_bytes = sizes.kept(stage.lora, engine, stage.micro_batch, stage.block)
    return memory.footprint(sizes.shape(stage.lora), kept_bytes, engine, stage, machines.number)


def _host(shape: Shape, setting: Setting) -> int:
    """Bytes of a node's host: what is offloaded, or, before that, the float32 weights that each worker reads."""
    on_node = min(setting.machines.number, setting.machines.kind.per_node)
    read = 4 * shape.parameters if setting.engine.zero_stage < 3 else 0
    return on_node * max(memory.states(shape, setting.engine, setting.machines.number).host, read)


def _disk(shape: Shape, setting: Setting) -> int:
    on_node = min(setting.machines.number, setting.machines.kind.per_node)
    return on_node * memory.states(shape, setting.engine, setting.machines.number).disk


def _estimates(shape: Shape, setting: Setting) -> Iterator[tuple[str, tuple[int, int]]]:
    machines = setting.machines
    for zero in (2, 3):
        engine = setting.engine.model_copy(update={"zero_stage": zero})
        try:
            on_node = min(machines.number, machines.kind.per_node)
            yield f"zero-{zero}", memory.deepspeed_states(shape, engine, on_node, machines.nodes)
        except memory.EstimatorError:
            return
