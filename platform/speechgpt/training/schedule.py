"""The learning rate over a stage."""

import math

from speechgpt.training.config import StageSection


def rate_at(step: int, stage: StageSection) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, hold, then the stage's decay, zero after the last step."""
    warm_up = round(stage.warmup * stage.steps)
    if step < warm_up:
        return stage.learning_rate * (step + 1) / warm_up
    decay_from = max(warm_up, round(stage.hold * stage.steps))
    if stage.schedule == "constant" or step < decay_from:
        return stage.learning_rate
    progress = (step - decay_from) / max(1, stage.steps - decay_from)
    if stage.schedule == "linear":
        return stage.learning_rate * (1 - progress)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
