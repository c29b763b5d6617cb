"""How an encoder learns to hear: cross-entropy against a teacher's unit at every frame that an objective asks about."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.augment import augment
from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.speech.encoder import batches_by_length
from speechgpt.speech.hubert import HubertFeatures
from speechgpt.training.engine import set_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")

IGNORED = -100
"""Label of a frame that is not learnt from."""
WINDOW = 32
"""Pieces of the corpus whose clips are shuffled together, and lie in a worker's memory."""
_POOL = 32
"""Batches whose clips are sorted by length together: enough for little padding, few enough to stay shuffled."""
_AHEAD = 2
"""Batches that are made ready while the one before them is learnt from."""


class Clip(NamedTuple):
    wave: np.ndarray
    """float32 [samples] at 16 kHz."""
    targets: np.ndarray
    """int [frames], the teacher's unit of each."""


class Batch(NamedTuple):
    """Clips as a model takes them, and what it is asked about them."""

    sound: Tensor
    """[clips, samples], normalised, zero after each clip."""
    lengths: list[int]
    """Samples of each."""
    labels: Tensor
    """int64 [clips, frames]: the teacher's unit of each frame that is asked about, else -100."""
    hidden: Tensor | None = None
    """bool [clips, frames], what the transformer is not shown; None: it is shown all."""

    def to(self, device: torch.device) -> "Batch":
        hidden = None if self.hidden is None else self.hidden.to(device)
        return Batch(self.sound.to(device), self.lengths, self.labels.to(device), hidden)


class Losses(NamedTuple):
    """Sums over the frames of a batch that are asked about."""

    total: Tensor
    """Nats, with gradients."""
    right: Tensor
    frames: Tensor


class Objective(nn.Module, ABC):
    """A HuBERT, and what turns its frames into logits of the teacher's units."""

    asked: ClassVar[str]
    """Which frames are asked about, as figures are named."""

    def __init__(self, features: HubertFeatures) -> None:
        super().__init__()
        self.hubert = features.model.train()
        self._features = features

    @abstractmethod
    def batch(self, clips: Sequence[Clip], seed: int) -> Batch:
        """What is asked of the clips, wherever it is drawn by the seed."""

    @abstractmethod
    def logits(self, frames: Tensor) -> Tensor:
        """[frames, dimensions] -> [frames, classes]."""

    def forward(self, batch: Batch) -> Losses:
        frames = self._features.forward(batch.sound, batch.lengths, batch.hidden)
        asked = batch.labels != IGNORED
        labels, logits = batch.labels[asked], self.logits(frames[asked]).float()
        right = (logits.argmax(-1) == labels).sum()
        return Losses(nn.functional.cross_entropy(logits, labels, reduction="sum"), right, torch.tensor(len(labels)))

    @torch.no_grad()
    def measure(self, clips: Iterable[Clip]) -> dict[str, float]:
        """Of unchanged clips, each asked the same at every look: loss in nats and share of right units, by name."""
        device = next(self.parameters()).device
        total = right = frames = 0.0
        self.eval()
        for number, clip in enumerate(clips):
            losses = self(self.batch([clip], number).to(device))
            total, right, frames = total + float(losses.total), right + int(losses.right), frames + int(losses.frames)
        self.train()
        share = (total / frames, right / frames) if frames else (math.nan, math.nan)
        return {f"{self.asked}_loss": share[0], f"{self.asked}_accuracy": share[1]}


@dataclass(frozen=True)
class Progress:
    """What one step reports, of the frames of all ranks."""

    step: int
    loss: float
    accuracy: float
    """Share of frames whose unit was right."""
    seconds: float
    """This rank's audio in the step."""


def batch_plan(
    seconds: Sequence[float] | np.ndarray,
    pieces: Sequence[np.ndarray],
    section: EncoderTrainingSection,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[int]]:
    """Endless batches of one rank: numbers of clips in an order of the seed, each clip once an epoch of all ranks.

    seconds: of each clip. pieces: the numbers of clips that lie together. A rank goes through its share of the pieces
    a WINDOW at a time. Raises ValueError where there are fewer pieces than ranks.
    """
    if len(pieces) < world:
        raise ValueError(f"{len(pieces)} pieces of a corpus for {world} workers: it is too small for so many")
    budget = int(section.batch_seconds * 1000)
    epoch = 0
    while True:
        share = np.random.default_rng((seed, epoch)).permutation(len(pieces))[rank::world]
        draw = np.random.default_rng((seed, epoch, rank))
        for first in range(0, len(share), WINDOW):
            order = draw.permutation(np.concatenate([pieces[number] for number in share[first : first + WINDOW]]))
            mean = float(np.mean([seconds[number] for number in order]))
            pool = max(1, int(_POOL * section.batch_seconds / max(mean, 1e-3)))
            for start in range(0, len(order), pool):
                clips = order[start : start + pool]
                batches = batches_by_length([int(seconds[number] * 1000) for number in clips], budget)
                for which in draw.permutation(len(batches)):
                    yield [int(clips[place]) for place in batches[which]]
        epoch += 1


def learning_rate(step: int, section: EncoderTrainingSection) -> float:
    """Warm-up over 4 % of the steps, hold to 40 %, then linear to 2 % of the peak."""
    done = step / section.steps
    return section.learning_rate * min(1.0, (done + 1 / section.steps) / 0.04, max(0.02, (1 - done) / 0.6))


def train(
    engine: "DeepSpeedEngine",
    clips: Iterator[Sequence[Clip]],
    section: EncoderTrainingSection,
    *,
    seed: int,
    first_step: int = 0,
) -> Iterator[Progress]:
    """Train the Objective under `engine` from `first_step` on, one optimiser step at a time.

    clips: this rank's batches, which must already stand at that step; they are read, changed and padded on a thread
    while the model learns. A step's loss is the mean over the frames of all ranks, whichever had more. What is
    changed, hidden and dropped is a function of seed, step and rank.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    objective: Objective = engine.module

    def ready(step: int) -> tuple[Batch, int]:
        draw = np.random.default_rng((seed, step, rank))
        heard = changed(next(clips), section.augment, draw)
        return objective.batch(heard, int(draw.integers(2**32))), int(draw.integers(2**62))

    steps = range(first_step, section.steps)
    for step, (batch, dropout) in zip(steps, _ahead(ready, steps), strict=True):
        torch.manual_seed(dropout)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=section.precision == "bf16"):
            losses: Losses = engine(batch.to(engine.device))
        sums = torch.stack([each.detach().to(engine.device, torch.float64) for each in losses])
        distributed.all_reduce(sums)
        total, right, frames = sums.tolist()
        # DeepSpeed takes the mean over ranks; this makes it the mean over frames.
        engine.backward(losses.total * (world / max(frames, 1.0)))
        set_rate(engine, learning_rate(step, section))
        engine.step()
        heard = sum(batch.lengths) / SAMPLE_RATE
        yield Progress(step + 1, total / max(frames, 1.0), right / max(frames, 1.0), heard)


def changed(clips: Sequence[Clip], share: float, draw: np.random.Generator) -> list[Clip]:
    """The clips, that share of them augmented."""
    return [Clip(*augment(*clip, draw)) if draw.random() < share else clip for clip in clips]


def _ahead(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """What `make` gives of each step, in order, a few of them made before they are asked for."""
    waiting: deque[Future[T]] = deque()
    thread = ThreadPoolExecutor(1)
    try:
        for step in steps:
            waiting.append(thread.submit(make, step))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
