"""One of the two processes of test_zero."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from conftest import tiny_model
from torch import distributed

from speechgpt.training import blocks, engine, loop
from speechgpt.training.config import EngineSection, LoraSection, StageSection
from speechgpt.training.export import export
from speechgpt.training.objective import Objective
from speechgpt.training.starting import add_lora, load

block_file, directory = map(Path, sys.argv[1:])
STAGE = StageSection(
    mixture={"text": 1}, steps=10, block=32, micro_batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=6
)


class Merged:
    """Every rank's part copied into one directory, as Ray Train does with what the ranks report."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.losses: list[float] = []

    def report(self, figures: dict[str, float], part: Path | None) -> None:
        if part is None:
            self.losses.append(figures["loss"])
        else:
            shutil.copytree(part, self.root / f"step-{int(figures['step']):03}", dirs_exist_ok=True)
            shutil.rmtree(part)
            distributed.barrier()

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        for path in sorted(self.root.glob("step-*"), reverse=True):
            yield nullcontext(path)


def train(zero_stage: int, store: Merged, lora: LoraSection | None = None):
    section = EngineSection(workers=2, zero_stage=zero_stage)
    settings = engine.configuration(section, STAGE, 2)
    if zero_stage == 3:
        # So small a model would otherwise stay whole on every rank.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(0)
    with engine.partitioned_loading(settings):
        model = load(directory / "start", gradient_checkpointing=False)
    if lora:
        model = add_lora(model, lora, "crossmodal", seed=1)
    started = engine.under_zero(Objective(model, 44, 20), section, STAGE, settings)
    loop.train(started, blocks.Blocks(block_file), STAGE, store.report, store)
    return started


engine.join(EngineSection(workers=2))
rank = distributed.get_rank()
if rank == 0:
    tiny_model(tied=False).save_pretrained(directory / "start")
distributed.barrier()
outcome: dict[str, object] = {}
for zero_stage in (0, 2, 3):
    store = Merged(directory / f"run-{zero_stage}")
    started = train(zero_stage, store)
    outcome[str(zero_stage)] = store.losses
    export(started, directory / f"model-{zero_stage}" if rank == 0 else None)
    distributed.barrier()
adapted = train(3, Merged(directory / "run-lora"), LoraSection(rank=2, alpha=4))
export(adapted, directory / "adapter-3" if rank == 0 else None)

distributed.barrier()
if rank == 0:
    shutil.rmtree(directory / "run-2" / "step-010")
distributed.barrier()
resumed = Merged(directory / "run-2")
train(2, resumed)
outcome["resumed"] = resumed.losses
if rank == 0:
    (directory / "losses.json").write_text(json.dumps(outcome))
distributed.barrier()
