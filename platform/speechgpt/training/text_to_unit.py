"""Training of the text-to-unit model: cross-entropy of each pair's units, from a model that starts from nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from speechgpt.language.normaliser import words
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.text_to_unit import TextToUnit, TokenizerText, padded
from speechgpt.training.config import TextToUnitSection

_POOL = 64
"""Batches whose pairs are sorted by length together: enough for little padding, few enough to stay shuffled."""
_IGNORED = -100
_ROUND = 64
"""The vocabulary's size is made a multiple of this."""
SMALL = {
    "d_model": 256,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "dropout": 0.1,
    "max_position_embeddings": 1536,
}
"""BartConfig of a recipe that says nothing else."""


class Pair(NamedTuple):
    """A text and its merged units."""

    text: str
    units: tuple[int, ...]


def scratch(section: TextToUnitSection, texts: Sequence[str], units: int, seed: int) -> TextToUnit:
    """A fresh model of `units` units whose text vocabulary is learnt from `texts`; the same for the same arguments."""
    tokenizer = train_tokenizer([" ".join(words(text)) for text in texts], section.text_vocabulary)
    first = len(tokenizer)
    config = BartConfig(
        **(SMALL | section.architecture),
        vocab_size=-(-(first + units) // _ROUND) * _ROUND,
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(config)
    return TextToUnit(model, TokenizerText(tokenizer), tuple(range(first, first + units)), "spoken")


class Example(NamedTuple):
    """A pair in tokens."""

    source: list[int]
    target: list[int]


def examples(maker: TextToUnit, pairs: Sequence[Pair]) -> tuple[list[Example], int]:
    """The pairs in tokens, and how many were left out since the model has no positions for them."""
    limit = maker.model.config.max_position_embeddings
    made = [Example(maker.source(pair.text), maker.target(pair.units)) for pair in pairs]
    kept = [each for each in made if 1 < len(each.source) <= limit and 1 < len(each.target) <= limit]
    return kept, len(made) - len(kept)


def batch_plan(lengths: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of example numbers, each of at most `tokens` targets with padding (or of one example).

    Raises ValueError where there is no example.
    """
    if not lengths:
        raise ValueError("no pair is short enough for text_to_unit.architecture: raise its max_position_embeddings")
    epoch = 0
    while True:
        draw = np.random.default_rng((seed, epoch))
        order = draw.permutation(len(lengths))
        pool = max(1, int(_POOL * tokens / max(float(np.mean(lengths)), 1.0)))
        for start in range(0, len(order), pool):
            chosen = sorted(order[start : start + pool].tolist(), key=lambda i: (lengths[i], i))
            batches = _cut(chosen, lengths, tokens)
            for which in draw.permutation(len(batches)):
                yield batches[which]
        epoch += 1


def _cut(chosen: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for number in chosen:
        # Sorted by length: the newest is the longest, which the others are padded to.
        if batches and (len(batches[-1]) + 1) * lengths[number] <= tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def rate_at(step: int, section: TextToUnitSection) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then linear to zero after the last step."""
    warm_up = max(1, round(section.warmup * section.steps))
    if step < warm_up:
        return section.learning_rate * (step + 1) / warm_up
    return section.learning_rate * (section.steps - step) / max(1, section.steps - warm_up)


def loss(model: nn.Module, batch: Sequence[Example], pad: int, start: int, smoothing: float) -> torch.Tensor:
    """Nats a unit, label smoothing included; the end counts as a unit."""
    device = next(model.parameters()).device
    ids, mask = padded([each.source for each in batch], pad)
    labels, known = padded([each.target for each in batch], _IGNORED)
    given, _ = padded([[start, *each.target[:-1]] for each in batch], pad)
    # What follows a row's end is not counted, and sees only what is before it: it needs no mask.
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), decoder_input_ids=given.to(device), use_cache=False
    ).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.to(device).flatten(), ignore_index=_IGNORED, label_smoothing=smoothing
    )


@dataclass(frozen=True)
class Progress:
    """What one step reports."""

    step: int
    loss: float
    rate: float


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Example],
    batches: Iterator[list[int]],
    section: TextToUnitSection,
    *,
    pad: int,
    start: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[Progress]:
    """Train from `first_step` on, one optimiser step at a time. `batches` must already stand at that step."""
    device = next(model.parameters()).device
    for step in range(first_step, section.steps):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout is a function of seed and step
        model.train()
        rate = rate_at(step, section)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=section.precision == "bf16"):
            of_step = loss(model, [data[i] for i in next(batches)], pad, start, section.label_smoothing)
        optimizer.zero_grad()
        of_step.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield Progress(step + 1, of_step.item(), rate)


def measure(maker: TextToUnit, pairs: Sequence[Pair], section: TextToUnitSection) -> dict[str, float]:
    """On pairs that training did not see: `unit_loss` (nats, without smoothing) and, of what it writes by itself,
    `unit_error_rate` (edits for each unit of the recording; two people who say the same differ, too), `length_ratio`,
    and `unfinished`, the share that came to no end."""
    maker.model.eval()
    config = maker.model.config
    held, _ = examples(maker, pairs)
    total = count = 0.0
    with torch.inference_mode():
        for each in held:
            total += (
                len(each.target)
                * loss(maker.model, [each], config.pad_token_id, config.decoder_start_token_id, 0.0).item()
            )
            count += len(each.target)
    written = maker.write([pair.text for pair in pairs], section.beams, section.max_units)
    ended = [(said, pair.units) for said, pair in zip(written, pairs, strict=True) if said]
    edits = sum(Levenshtein.distance(said, units) for said, units in ended)
    figures = {"unit_loss": total / max(count, 1), "unfinished": 1 - len(ended) / max(len(pairs), 1)}
    if ended:
        of_recordings = sum(len(units) for _, units in ended)
        figures["unit_error_rate"] = edits / of_recordings
        figures["length_ratio"] = sum(len(said) for said, _ in ended) / of_recordings
    return figures
