"""A model in training answers questions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from speechgpt.language.config import GenerationSection
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import Kind, PromptFormat
from speechgpt.language.vocabulary import Vocabulary

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_LONGEST = 400
"""Tokens of an answer: a dozen seconds of speech show what there is to hear."""


def answered(
    engine: "DeepSpeedEngine",
    vocabulary: Vocabulary,
    prompts: PromptFormat,
    questions: Sequence[tuple[Kind, list[int]]],
    generation: GenerationSection,
) -> list[dict[str, Any]]:
    """The most likely reply to each (kind, prompt), as `kind, transcript, text, units, well_formed, finish`.

    One process suffices, since the weights are whole on it; ZeRO-3's are not: ValueError. No random number is drawn.
    """
    if engine.zero_optimization_stage() == 3:
        raise ValueError("under ZeRO-3 no rank holds the weights to answer with")
    greedy = generation.model_copy(
        update={"temperature": 0.0, "max_new_tokens": min(_LONGEST, generation.max_new_tokens)}
    )
    model = SpeechLanguageModel(engine.module.model, vocabulary, prompts)
    found: dict[int, dict[str, Any]] = {}
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        for kind in sorted({kind for kind, _ in questions}):
            places = [place for place, (other, _) in enumerate(questions) if other == kind]
            replies = model.continued([questions[place][1] for place in places], kind, greedy)
            found |= {place: {"kind": kind, **reply._asdict()} for place, reply in zip(places, replies, strict=True)}
    return [found[place] for place in range(len(questions))]
