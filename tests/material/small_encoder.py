"""A HuBERT small enough to be trained within a test, under a DeepSpeed engine of its own."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from speechgpt.speech.audio import SAMPLE_RATE
from speechgpt.speech.config import EncoderTrainingSection
from speechgpt.training import engine, hearing
from speechgpt.training.config import EngineSection, StageSection

ARCHITECTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}


def under_zero(model: hearing.Objective, section: EncoderTrainingSection) -> Any:
    under = EngineSection(workers=1, zero_stage=2)
    stage = StageSection(mixture={}, steps=section.steps, micro_batch=1, learning_rate=1e-3, weight_decay=0.01)
    engine.join(under)
    return engine.under_zero(model, under, stage, engine.configuration(under, stage, 1))


def steps(
    deepspeed: Any, clips: Sequence[hearing.Clip], section: EncoderTrainingSection, first: int = 0
) -> Iterator[hearing.Progress]:
    """Train on these clips, from the step `first` on."""
    seconds = [len(clip.wave) / SAMPLE_RATE for clip in clips]
    plan = islice(hearing.batch_plan(seconds, [np.arange(len(clips))], section, 0), first, None)
    batches = ([clips[number] for number in batch] for batch in plan)
    return hearing.train(deepspeed, batches, section, seed=0, first_step=first)
