"""What test_resizing runs: each case trained in phases of other numbers of processes, which are forked here.

So what takes long, the imports, is paid once.
"""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from tiny_models import tiny_llama
from torch import distributed

from speechgpt.training import blocks, elastic, engine, loop
from speechgpt.training.config import EngineSection, LoraSection, StageSection
from speechgpt.training.objective import Objective
from speechgpt.training.starting import add_lora, load

block_file, directory = map(Path, sys.argv[1:3])
STAGE = StageSection(
    mixture={"text": 1}, steps=9, block=32, micro_batch=1, accumulation=2, learning_rate=1e-2, log_every=1,
    checkpoint_every=3, weight_decay=0.1, clip=1.0,
)  # fmt: skip
PATIENCE = 5
LORA = LoraSection(rank=2, alpha=4, dropout=0.2)
CASES = {
    "zero-0": (0, None),
    "zero-1": (1, None),
    "zero-2": (2, None),
    "zero-3": (3, None),
    "lora-2": (2, LORA),
    "lora-3": (3, LORA),
}


class Merged:
    """Every rank's part moved into one directory, as Ray Train does with what the ranks report."""

    def __init__(self, place: Path, until: int) -> None:
        self.place, self.until = place, until
        self.losses: dict[int, float] = {}

    def report(self, figures: dict[str, float], part: Path | None) -> None:
        step = int(figures["step"])
        if part is None:
            self.losses[step] = figures["loss"]
            return
        shutil.copytree(part, self.place / f"step-{step:03}", dirs_exist_ok=True)
        shutil.rmtree(part)
        distributed.barrier()
        if step == self.until:
            raise KeyboardInterrupt

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        for path in sorted(self.place.glob("step-*"), reverse=True):
            yield nullcontext(path)


def train(zero_stage: int, lora: LoraSection | None, store: Merged, section: EngineSection | None = None) -> None:
    world = distributed.get_world_size()
    section = section or EngineSection(workers=(1, 2), zero_stage=zero_stage)
    stage = elastic.for_workers(STAGE, section, world)
    settings = engine.configuration(section, stage, world)
    if zero_stage == 3:
        # So small a model would otherwise stay whole on every rank.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(0)
    with engine.partitioned_loading(settings):
        model = load(directory / "start", gradient_checkpointing=False)
    if lora:
        model = add_lora(model, lora, "crossmodal", seed=1)
    started = engine.under_zero(Objective(model, 44, 20), section, stage, settings)
    with suppress(KeyboardInterrupt):
        loop.train(started, blocks.Blocks(block_file), stage, store.report, store, seed=3)


def phase(root: str, until: int, names: list[str]) -> None:
    """Train these cases from where they are to step `until`, as one of the processes."""
    engine.join(EngineSection())
    outcome = {}
    for name in names:
        store = Merged(directory / root / name, until)
        train(*CASES[name], store)
        outcome[name] = store.losses
    if distributed.get_rank() == 0:
        (directory / root / f"losses-{until:02}.json").write_text(json.dumps(outcome))
    distributed.barrier()


def hang() -> None:
    """Train; after the second step rank 1 stops without dying, as a machine does whose network is gone."""
    engine.join(EngineSection(collective_timeout_seconds=PATIENCE))

    class Stopping(Merged):
        def report(self, figures: dict[str, float], part: Path | None) -> None:
            if distributed.get_rank() == 1 and figures["step"] == 2:
                os.kill(os.getpid(), signal.SIGSTOP)

    train(2, None, Stopping(directory / "hung", until=0), EngineSection(collective_timeout_seconds=PATIENCE))


def forked(world: int, work: Callable[[], None]) -> list[int]:
    """Process ids of `world` processes that do it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with suppress(BaseException):
            try:
                work()
                os._exit(0)
            except Exception as error:
                traceback.print_exc()
                (directory / f"error-{rank}.txt").write_text(str(error))
                raise
        os._exit(1)
    return children


def trained(world: int, root: str, until: int, names: list[str]) -> None:
    (directory / root).mkdir(exist_ok=True)
    children = forked(world, partial(phase, root, until, names))
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * world, codes


if __name__ == "__main__":
    cases = sys.argv[3].split(",")
    engine.import_deepspeed()
    tiny_llama(tied=False).save_pretrained(directory / "start")
    # All ZeRO stages have the same losses.
    trained(2, "fixed", STAGE.steps, ["zero-2", "lora-2"])
    trained(2, "resumed", 6, ["zero-2", "lora-2"])
    trained(2, "resumed", STAGE.steps, ["zero-2", "lora-2"])
    trained(2, "resized", 3, cases)
    trained(1, "resized", 6, cases)
    trained(2, "resized", STAGE.steps, cases)
    waiting, stopped = forked(2, hang)
    code = os.waitpid(waiting, 0)[1]
    os.kill(stopped, signal.SIGKILL)
    os.waitpid(stopped, 0)
    reason = (directory / "error-0.txt").read_text() if code else ""
    (directory / "hung.json").write_text(json.dumps({"code": code, "reason": reason}))
