"""`speechgpt bench NAME`: measure this machine against the published programs and the bare engine, in one run."""

from typing import Annotated, Literal

import typer

from speechgpt.interop.benches.command import Json, Seed, Threads, app, show

__all__ = ["app"]


@app.command()
def train(
    rows: Annotated[
        Literal["crossmodal", "chain"],
        typer.Option(help="Lengths of SpeechInstruct's cross-modal or chain-of-modality rows."),
    ] = "crossmodal",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each side takes.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps in a turn.")] = 1,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches in a step; the authors' have 12 and 4.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each side.")] = 1,
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="Of ours and of the bare engine.")] = 2,
    threads: Threads = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tokens a second of the training loop, against bare DeepSpeed and the Hugging Face Trainer on padded rows."""
    from functools import partial

    from speechgpt.benches.train import Settings, run

    settings = Settings(rows, rounds, steps, accumulation, workers, zero_stage)
    show(partial(run, settings), rounds, threads, seed, json, unit="rounds")
