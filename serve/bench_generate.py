"""`speechgpt bench generate`: tokens a second of the engine vLLM, against the engine in the replica, in one run."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speechgpt.interop.benches.command import Json, Seed, Threads, show

if TYPE_CHECKING:
    from serve.engine import Engine, Request

CROWDS = (1, 8, 16)
"""Requests that come at the same moment."""
_WORDS = (
    "the",
    "old",
    "man",
    "walked",
    "to",
    "a",
    "small",
    "river",
    "my",
    "sister",
    "looked",
    "at",
    "an",
    "empty",
    "house",
)


def main(
    bundle: Annotated[str, typer.Option(help="Whose language model: directory, s3://…, shipped name.")] = "nano",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each engine takes with each crowd.")] = 5,
    threads: Threads = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tokens a second of vLLM with 1, 8 and 16 requests at once, against the engine on transformers."""
    show(lambda *asked: run(bundle, *asked), rounds, threads, seed, json, unit="rounds")


def run(
    bundle: str, rounds: int, threads: int, seed: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """The result as `bench` prints it. Both engines read the same text aloud, 100 tokens each, greedily in float32."""
    import os
    import statistics

    from serve.vllm_engine import VllmMissingError, check_installed
    from speechgpt.interop.benches.baseline import BenchError
    from speechgpt.runtime.bundle import load

    try:
        check_installed()
    except VllmMissingError as error:
        raise BenchError(str(error)) from None
    os.environ["OMP_NUM_THREADS"] = str(threads)
    speeds = asyncio.run(_speeds(load(bundle, "").directory, rounds, threads, seed, advance))
    crowds = {
        f"{crowd} at once": {
            side: round(statistics.median(speeds[side, crowd]), 1) for side in ("vllm", "transformers")
        }
        for crowd in CROWDS
    }
    last = crowds[f"{CROWDS[-1]} at once"]
    return {
        "figure": last["vllm"],
        "unit": f"tokens a second of vLLM, {CROWDS[-1]} requests at once",
        "baseline": last["transformers"],
        "ratio": round(last["vllm"] / last["transformers"], 2),
        "conditions": {
            "bundle": bundle,
            "baseline": "the engine on transformers, in this process; the same weights, prompts and tokens",
            "crowds": crowds,
            "threads": threads,
            "load": round(os.getloadavg()[0], 1),
            "processors": os.cpu_count(),
        },
    }


async def _speeds(
    bundle: Path, rounds: int, threads: int, seed: int, advance: Callable[[int], None]
) -> dict[tuple[str, int], list[float]]:
    """Tokens a second of each engine and crowd, round by round; the engines take turns."""
    import torch

    from serve.engine import LocalEngine
    from serve.vllm_engine import VllmEngine
    from speechgpt import recipe
    from speechgpt.language.batching import ContinuousBatch
    from speechgpt.language.model import SpeechLanguageModel

    torch.set_num_threads(threads)
    model = SpeechLanguageModel.load(bundle / "language")
    serving = recipe.load("nano", (f"serving.language.batch={CROWDS[-1]}",)).serving
    adapter = bundle / "adapter" if (bundle / "adapter").is_dir() else None
    vllm = VllmEngine.load(bundle / "language", adapter, model.wording, serving)
    engines: dict[str, Engine] = {
        "vllm": vllm,
        "transformers": LocalEngine(ContinuousBatch(model, CROWDS[-1], quick=True), 600),
    }
    asked = _requests(model.wording, CROWDS[-1], seed)
    speeds: dict[tuple[str, int], list[float]] = {(side, crowd): [] for side in engines for crowd in CROWDS}
    try:
        for number in range(rounds + 1):
            for crowd in CROWDS:
                for side, engine in engines.items():
                    began = time.perf_counter()
                    counts = await asyncio.gather(*(_count(engine, request) for request in asked[:crowd]))
                    # The first round warms both.
                    if number:
                        speeds[side, crowd].append(sum(counts) / (time.perf_counter() - began))
            if number:
                advance(1)
    finally:
        vllm.close()
    return speeds


def _requests(wording: Any, count: int, seed: int) -> "list[Request]":
    import random

    from serve.engine import Request
    from speechgpt.language.config import GenerationSection

    draw = random.Random(seed)
    generation = GenerationSection(temperature=0, max_new_tokens=100)
    texts = [" ".join(draw.choices(_WORDS, k=20)) for _ in range(count)]
    prompts = [wording.vocabulary.encode_prompt(wording.prompts.speaking(text)) for text in texts]
    return [Request(tuple(prompt), "speak", generation, seed, 600) for prompt in prompts]


async def _count(engine: "Engine", request: "Request") -> int:
    return sum([len(few) async for few in engine.tokens(request)])
