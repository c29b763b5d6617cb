"""The training loop of every stage."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

from speechgpt.training import checkpoints, node_local
from speechgpt.training.blocks import Blocks
from speechgpt.training.config import StageSection
from speechgpt.training.engine import set_rate
from speechgpt.training.ledger import Ledger
from speechgpt.training.objective import Losses
from speechgpt.training.pace import Pace
from speechgpt.training.schedule import rate_at
from speechgpt.training.validation import Validation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Report = Callable[[dict[str, float], Path | None], None]
"""Takes figures and, at a checkpoint, the directory of this rank's part; the directory is the taker's, who removes it
when done with it, which may be long after it returns."""
Leaving = Callable[[], bool]
"""Whether to take a checkpoint now, out of turn, because a node will soon be gone. Every rank calls it at the same
steps and gets the same answer."""

_LOOK_SECONDS = 2.0
"""Between looks whether a node is leaving; clouds give notice of half a minute to two."""


def train(
    engine: "DeepSpeedEngine",
    blocks: Blocks,
    stage: StageSection,
    report: Report,
    store: checkpoints.CheckpointStore,
    seed: int = 0,
    leaving: Leaving | None = None,
    validation: Validation | None = None,
) -> int:
    """Train to the stage's last step, or to where `validation` stops it, from the newest whole checkpoint in `store`;
    give the number of blocks read.

    The module under `engine` is an Objective. Step s reads the blocks s·B to (s+1)·B - 1, B being the stage's blocks a
    step over all ranks, so that the position in the data is the step itself. Dropout is drawn from `seed` and the
    position, so it is the same for any number of ranks. A step's loss is the mean over the targets of all ranks,
    whatever blocks they fell to. Every rank calls `report` the same number of times.

    Raises RuntimeError at the end if some block was skipped or read twice.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    per_step = stage.micro_batch * stage.accumulation * world
    if len(blocks) < stage.steps * per_step:
        raise ValueError(f"{stage.steps} steps of {per_step} blocks need {stage.steps * per_step}, not {len(blocks)}")
    ledger = Ledger()
    done = checkpoints.restore(engine, store, ledger)
    if validation is not None:
        validation.begin(engine, done, lambda figures: report(figures, None))
        if done and validation.stopped:
            return ledger.settle(range(done * per_step), engine.device)
    curve, pace = _Curve(engine.device), Pace(_LOOK_SECONDS, engine.device)
    engine.train()
    for step in range(done, stage.steps):
        rate = rate_at(step, stage)
        set_rate(engine, rate)
        of_step = range(step * per_step, (step + 1) * per_step)
        # DeepSpeed takes the mean over ranks and micro-batches; this makes it the mean over targets.
        scale = world * stage.accumulation / max(float(blocks.weight[of_step].sum()), 1e-9)
        for micro in range(stage.accumulation):
            share = _share(of_step, micro * world + rank, stage.micro_batch)
            batch = blocks.read(share).to(engine.device)
            ledger.add(share)
            torch.manual_seed(_draw(seed, share[0]))
            losses = engine(batch)
            engine.backward(losses.weighted * scale)
            engine.step()
            curve.add(losses)
        curve.count(int(blocks.tokens[of_step].sum()))
        finished = step + 1
        if finished % stage.log_every == 0 or finished == stage.steps:
            report({"step": finished, "learning_rate": rate, **curve.take()}, None)
        began = time.perf_counter()
        enough = validation is not None and validation.after(engine, finished, lambda figures: report(figures, None))
        curve.leave_out(time.perf_counter() - began)
        last_call = leaving is not None and pace.due(finished) and leaving()
        if finished % stage.checkpoint_every == 0 or finished == stage.steps or last_call or enough:
            directory = node_local.scratch("checkpoint")
            checkpoints.save(engine, directory, finished, ledger)
            report({"step": finished}, directory)
            curve.restart_clock()
        if enough:
            return ledger.settle(range(finished * per_step), engine.device)
    return ledger.settle(range(stage.steps * per_step), engine.device)


def _draw(seed: int, first_block: int) -> int:
    """A seed for the micro-batch that begins with that block."""
    return int(np.random.SeedSequence([seed, first_block]).generate_state(1, np.uint64)[0])


def _share(of_step: range, turn: int, size: int) -> Sequence[int]:
    return of_step[turn * size : (turn + 1) * size]


class _Curve:
    """Losses and speed since they were last taken, over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._tokens = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something else."""
        self._since += seconds

    def add(self, losses: Losses) -> None:
        self._sums += torch.stack([value.double() for value in losses[1:]])

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Nats per text and per unit target (left out when there were none) and tokens a second over all ranks."""
        distributed.all_reduce(self._sums)
        text, text_tokens, units, unit_tokens = self._sums.tolist()
        seconds = time.perf_counter() - self._since
        figures = {
            "tokens_per_second": self._tokens / seconds,
            "targets_per_second": (text_tokens + unit_tokens) / seconds,
        }
        if text_tokens:
            figures["loss_text"] = text / text_tokens
        if unit_tokens:
            figures["loss_units"] = units / unit_tokens
        figures["loss"] = (text + units) / max(text_tokens + unit_tokens, 1)
        self._sums.zero_()
        self._tokens = 0
        self.restart_clock()
        return figures
