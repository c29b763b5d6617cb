"""One worker of test_plan_memory: a few steps of a model of random weights, and the most memory it ever had."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from speechgpt.training import blocks, engine, loop, packing, starting
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.objective import Objective

engine.import_deepspeed()
# What importing them builds, too.
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True)
torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 1, 16, 16)] * 3)


def kilobytes(name: str) -> int:
    """VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


class _Nothing:
    """Figures and checkpoints go nowhere."""

    def report(self, figures: dict[str, float], directory: Path | None) -> None:
        pass

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        return iter(())


asked = json.loads(sys.argv[1])
folder = Path(sys.argv[2])
section, stage = EngineSection(**asked["engine"]), StageSection(**asked["stage"])
engine.join(section)
rank, world = distributed.get_rank(), distributed.get_world_size()
file = folder / f"blocks-{rank}.arrow"
count = stage.steps * stage.micro_batch * stage.accumulation * world
rng = np.random.default_rng(0)
row = (rng.integers(3, 900, stage.block), np.ones(stage.block, np.float32))
blocks.write(file, [blocks.table(range(count), [packing.pack([row], stage.block, 0)] * count)], stage.block)
before = kilobytes("VmRSS")
torch.manual_seed(0)
settings = engine.configuration(section, stage, world)
with engine.partitioned_loading(settings):
    model = starting.load(Path(asked["model"]), section.gradient_checkpointing)
if stage.lora:
    model = starting.add_lora(model, stage.lora, "crossmodal", seed=1)
objective = Objective(model, 900, 50)
print(rank, "loaded", (kilobytes("VmRSS") - before) // 1024, file=sys.stderr)
started = engine.under_zero(objective, section, stage, settings)
print(rank, "engine", (kilobytes("VmRSS") - before) // 1024, (kilobytes("VmHWM") - before) // 1024, file=sys.stderr)
store = _Nothing()
loop.train(started, blocks.Blocks(file), stage, store.report, store)
print(rank, "trained", (kilobytes("VmRSS") - before) // 1024, (kilobytes("VmHWM") - before) // 1024, file=sys.stderr)
for kind in ("RssAnon", "RssFile"):
    print(rank, kind, kilobytes(kind) // 1024, file=sys.stderr)
if rank == 0:
    peak = (kilobytes("VmHWM") - before) * 1024
    print(json.dumps({"peak": peak, "parameters": engine.parameter_count(model)}))
