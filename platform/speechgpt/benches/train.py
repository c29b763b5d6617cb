"""`bench train`: real tokens a second of our loop, of the bare engine, and of the Trainer on padded rows."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path
from typing import Any

import numpy as np

from speechgpt.benches.rows import RowLengths, Rows, draw
from speechgpt.benches.turns import Program
from speechgpt.interop.benches.baseline import BenchError
from speechgpt.interop.benches.encode import machine
from speechgpt.interop.benches.timing import Taken, operations, peak

TEXT, UNITS = 856, 1000
SHAPE: dict[str, Any] = {
    "vocab_size": TEXT + UNITS,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""A LLaMA of 11 million parameters. As in the 7B, the head is a small part of the work, so a small vocabulary."""
SIDES = ("our_loop", "bare_deepspeed", "padded_trainer")


@dataclass(frozen=True)
class Settings:
    rows: RowLengths = "crossmodal"
    rounds: int = 5
    steps: int = 1
    """Optimiser steps in a turn."""
    accumulation: int = 4
    """Micro-batches in a step. The authors' scripts have 12 (cross-modal) and 4 (chain of modality)."""
    workers: int = 1
    zero_stage: int = 2


def run(
    settings: Settings, _: int, threads: int, seed: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """The result as `bench` prints it. folder: an empty directory for what all sides read."""
    # DeepSpeed, which transformers imports, tells standard output what it found; that is the result's.
    with redirect_stdout(sys.stderr):
        return _measure(settings, threads, seed, folder, advance)


def _measure(
    settings: Settings, threads: int, seed: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    rows, block, fill = prepare(settings, seed, folder)
    parameters, work = size_and_work(folder, rows.block)
    taken, tokens, places = {side: Taken() for side in SIDES}, dict.fromkeys(SIDES, 0), 0
    losses: dict[str, list[float]] = {side: [] for side in SIDES[:2]}
    with ExitStack() as opened:
        sides = {
            side: opened.enter_context(Program(f"speechgpt.benches.{side}", folder, settings.workers, threads))
            for side in SIDES
        }
        for side, program in sides.items():
            # Allocations, and the choice of kernels, are not what is measured.
            answer = program.turn()
            if side in losses:
                losses[side].append(answer["loss"])
        for _round in range(settings.rounds):
            for side, program in sides.items():
                answer = program.turn()
                taken[side].add(answer["wall"], answer["processor"])
                tokens[side] += answer["tokens"]
                places += answer.get("places", 0)
            advance(1)
        profiles = {side: program.turn("profile")["profile"] for side, program in sides.items()}
    apart = abs(losses["our_loop"][0] / losses["bare_deepspeed"][0] - 1)
    if apart > 0.01:
        raise BenchError(f"the same first steps have losses {losses}, so the speeds of the two engines do not compare")
    speed = {side: tokens[side] / taken[side].processor for side in SIDES}
    wall = {side: tokens[side] / taken[side].wall for side in SIDES}
    floor = work / peak(torch.float32)
    return {
        "figure": round(speed["our_loop"], 1),
        "unit": "tokens that are not padding per processor-second, float32",
        "baseline": round(speed["bare_deepspeed"], 1),
        "ratio": round(speed["our_loop"] / speed["bare_deepspeed"], 3),
        "conditions": {
            **machine(threads),
            "workers": settings.workers,
            "accumulation": settings.accumulation,
            "zero_stage": settings.zero_stage,
            "rows": f"{settings.rows}: {len(rows.rows)}, {mean_length(rows):.0f} tokens on average, {rows.cut} cut at "
            f"{rows.block}",
            "model": f"LLaMA of {parameters} parameters, random weights",
            "baseline": f"bare DeepSpeed on the same blocks (one of {block} tokens a micro-batch), attention by rows",
            "clock": f"processor time, the sides in turn, {settings.rounds} turns of {settings.steps} steps each",
            "wall_ratio": round(wall["our_loop"] / wall["bare_deepspeed"], 3),
            "first_losses_apart": round(apart, 6),
            "block_fill": round(fill, 4),
            "trainer": {
                "figure": round(speed["padded_trainer"], 1),
                "what": f"transformers' Trainer as in the authors' scripts: {rows.batch} rows, padded to the longest",
                "ratio": round(speed["our_loop"] / speed["padded_trainer"], 3),
                "wall_ratio": round(wall["our_loop"] / wall["padded_trainer"], 3),
                "fill": round(tokens["padded_trainer"] / max(places, 1), 4),
            },
            "floor": {
                "operations_a_token": work,
                "seconds_a_token": round(floor, 7),
                "taken": {side: round(1 / speed[side], 7) for side in SIDES},
            },
            "profile": profiles,
        },
    }


def prepare(settings: Settings, seed: int, folder: Path) -> tuple[Rows, int, float]:
    """Write the model, the rows, the blocks made of them and the plan; rows, tokens of a block and the blocks' fill."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from speechgpt.training import blocks, packing

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)).save_pretrained(
        folder / "model"
    )
    # One turn before the measured ones, and one after them that is profiled.
    steps = (settings.rounds + 2) * settings.steps
    micro_batches = steps * settings.accumulation * settings.workers
    rows = draw(settings.rows, 64 + micro_batches * 16, SHAPE["vocab_size"], seed)
    block = block_of_a_batch(rows)
    order = (number % len(rows.rows) for number in counting())
    planned = packing.plan(order, [len(ids) for ids, _ in rows.rows], block)
    packed = [
        packing.pack([rows.rows[number] for number in next(planned)], block, pad_id=0) for _ in range(micro_batches)
    ]
    blocks.write(folder / "blocks.arrow", [blocks.table(range(len(packed)), packed)], block)
    np.savez(
        folder / "rows.npz",
        ids=np.concatenate([ids for ids, _ in rows.rows]),
        weights=np.concatenate([weights for _, weights in rows.rows]),
        lengths=np.array([len(ids) for ids, _ in rows.rows]),
    )
    stage = {
        "mixture": {"transcribe": 1},
        "steps": steps,
        "block": block,
        "micro_batch": 1,
        "accumulation": settings.accumulation,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup": 0.0,
        "log_every": settings.steps,
        "checkpoint_every": 10**9,
    }
    plan = {
        "seed": seed,
        "stage": {**stage, "clip": 1.0},
        "engine": {"workers": settings.workers, "zero_stage": settings.zero_stage},
        "units": [TEXT, UNITS],
        "rows_a_batch": rows.batch,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return rows, block, sum(each.tokens for each in packed) / (len(packed) * block)


def block_of_a_batch(rows: Rows) -> int:
    """Tokens of a block that holds about as many rows as the authors' script has in a batch: steps of both sides see as
    much. One long block fills better than several short ones, and attention by rows does not mind its length."""
    return rows.block * max(1, round(rows.batch * mean_length(rows) / rows.block))


def mean_length(rows: Rows) -> float:
    return float(np.mean([len(ids) for ids, _ in rows.rows]))


def size_and_work(folder: Path, block: int) -> tuple[int, float]:
    """Parameters, and operations a token of both passes, were every block full and every token learnt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.ones(1, block, dtype=torch.long)
    work = operations(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    return model.num_parameters(), work / block
