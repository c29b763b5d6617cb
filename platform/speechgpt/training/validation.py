"""Validation beside training: held-out losses, early stop, the best model kept, answers to fixed prompts.

What was found is written to a diary after every look. A resumed run reads it up to its own checkpoint and goes on as an
unbroken one would: looking draws no random number and leaves the weights as they are.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import distributed

from speechgpt.training.blocks import Batch, Blocks
from speechgpt.training.config import StageSection

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LOSS = "validation_loss"
"""The figure that early stop and the best model go by: nats a target, weighted as in training."""

Tell = Callable[[dict[str, float]], None]
"""Takes figures with their `step`."""


class Diary(Protocol):
    """What earlier attempts at this stage found, by step."""

    def read(self) -> Mapping[int, Mapping[str, float]]: ...

    def write(self, looks: Mapping[int, Mapping[str, float]]) -> None:
        """Replace the whole, atomically; called on rank 0 only."""


class Standing(NamedTuple):
    """Where a stage stands after some looks."""

    best_step: int
    since: int
    """Looks after the best."""


def standing(losses: Mapping[int, float]) -> Standing:
    """losses: validation loss by step; of equal ones the earliest is the best, and no number is never the best."""
    comparable = {step: loss if math.isfinite(loss) else math.inf for step, loss in losses.items()}
    best = min(sorted(comparable), key=lambda step: comparable[step])
    return Standing(best, sum(step > best for step in comparable))


class Validation:
    """Looks at a model every `stage.validate_every` steps. Every rank has one and calls it at the same steps.

    sets: blocks by prefix of their figures; that named "" is of the stage's own kinds and decides what is best.
    keep: saves the model of a step that is the best so far; every rank calls it.
    after_look: whatever else is done with the model at a look, in evaluation mode.
    """

    def __init__(
        self,
        sets: Mapping[str, Blocks],
        stage: StageSection,
        diary: Diary,
        keep: Callable[["DeepSpeedEngine", int], None] | None = None,
        after_look: Callable[["DeepSpeedEngine", int], None] | None = None,
    ) -> None:
        self._sets, self._stage, self._diary = sets, stage, diary
        self._keep, self._after_look = keep, after_look
        self.looks: dict[int, dict[str, float]] = {}

    def begin(self, engine: "DeepSpeedEngine", done: int, tell: Tell) -> None:
        """Before the first step of an attempt that goes on after `done` steps."""
        self.looks = {step: dict(figures) for step, figures in self._diary.read().items() if step <= done}
        if not self.looks:
            self._look(engine, done, tell)

    @property
    def stopped(self) -> bool:
        """Whether patience is at its end. The untrained model counts as a look."""
        return 0 < self._stage.patience <= self.standing.since

    @property
    def standing(self) -> Standing:
        return standing({step: figures[LOSS] for step, figures in self.looks.items()})

    def after(self, engine: "DeepSpeedEngine", step: int, tell: Tell) -> bool:
        """Look if it is time after `step` steps; whether the stage ends here for want of progress."""
        if step % self._stage.validate_every and step != self._stage.steps:
            return False
        self._look(engine, step, tell)
        return self.stopped

    def _look(self, engine: "DeepSpeedEngine", step: int, tell: Tell) -> None:
        engine.eval()
        figures: dict[str, float] = {}
        for prefix, blocks in self._sets.items():
            figures |= {prefix + name: value for name, value in measured(engine, blocks, self._stage).items()}
        self.looks[step] = figures
        # What the stage starts from is worth keeping only if the stage might end with it.
        if self._keep is not None and self.standing.best_step == step and (step or self._stage.leave == "best"):
            self._keep(engine, step)
        if distributed.get_rank() == 0:
            # After the model was kept: a diary that names a best step must have its model.
            self._diary.write(self.looks)
        tell({"step": step, **figures})
        if self._after_look is not None:
            self._after_look(engine, step)
        engine.train()


@torch.no_grad()
def measured(engine: "DeepSpeedEngine", blocks: Blocks, stage: StageSection) -> dict[str, float]:
    """Losses [nats] and perplexities over all blocks, by kind of token; what has no targets is left out.

    The ranks share the blocks. Under ZeRO-3 all must compute equally often, so a rank with nothing left computes on a
    block without targets.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    size = stage.micro_batch
    sums = torch.zeros(6, dtype=torch.float64, device=engine.device)
    for start in range(0, len(blocks), size * world):
        mine = [index for index in range(start + rank * size, start + (rank + 1) * size) if index < len(blocks)]
        batch = blocks.read(mine or [0]).to(engine.device)
        if not mine:
            batch = Batch(batch.ids, torch.zeros_like(batch.weights), batch.positions)
        losses = engine(batch)
        weight = batch.weights[:, 1:].double().sum()
        sums += torch.stack([*(value.double() for value in losses), weight])
    distributed.all_reduce(sums)
    weighted, text, text_tokens, units, unit_tokens, weight = sums.tolist()
    figures = {LOSS: weighted / max(weight, 1e-9)}
    for kind, total, tokens in (("text", text, text_tokens), ("units", units, unit_tokens)):
        if tokens:
            figures[f"{LOSS}_{kind}"] = total / tokens
            figures[f"validation_perplexity_{kind}"] = perplexity(total / tokens)
    return figures


def perplexity(loss: float) -> float:
    """exp of nats a token, without overflow."""
    return math.exp(min(loss, 700.0))
