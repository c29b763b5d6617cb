"""`speechgpt bench NAME`: measure this machine against the published programs, in one run."""

import json as json_module
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from speechgpt.interop.benches.baseline import BenchError
from speechgpt.runtime.progress import Progress

GROUP = "speechgpt.benches"
"""Entry points of benchmarks that live elsewhere (jobs, serve): functions for Typer, in modules that import little."""
app = typer.Typer(
    help=__doc__.partition(": ")[2].capitalize(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Clips = Annotated[int, typer.Option(min=1, help="Clips of mixed length, 1 to 12 s.")]
Threads = Annotated[int, typer.Option(min=1, help="Of either side.")]
Seed = Annotated[int, typer.Option(help="Of weights and clips.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]


@app.command()
def encode(clips: Clips = 200, threads: Threads = 1, seed: Seed = 0, json: Json = False) -> None:
    """Speech to units: HuBERT Base and 1000 centroids, against fairseq's own path."""
    from speechgpt.interop.benches.encode import run

    show(run, clips, threads, seed, json)


@app.command()
def vocoder(clips: Clips = 200, threads: Threads = 1, seed: Seed = 0, json: Json = False) -> None:
    """Units to speech: the published CodeHiFiGAN, whole and streamed, against fairseq's own path."""
    from speechgpt.interop.benches.vocoder import run

    show(run, clips, threads, seed, json)


def show(
    run: Callable[..., dict[str, Any]], amount: int, threads: int, seed: int, json: bool, unit: str = "clips"
) -> None:
    """Run a benchmark over `amount` of `unit` and print what it gives; exit code 1 where it cannot be run."""
    progress = Progress(silent=json)
    try:
        # DeepSpeed, which transformers imports, and Ray's workers say things on standard output.
        apart = redirect_stdout(sys.stderr) if json else nullcontext()
        with apart, tempfile.TemporaryDirectory() as folder, progress.count("measuring", amount, unit) as counter:
            result = run(amount, threads, seed, Path(folder), counter.advance)
    except BenchError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(json_module.dumps(result, indent=2))
        return
    typer.echo(f"{result['figure']} {result['unit']}; baseline {result['baseline']}: {result['ratio']} times as fast")
    _tell(result["conditions"])


def _tell(facts: dict[str, Any], depth: int = 1) -> None:
    for name, value in facts.items():
        label = "  " * depth + name.replace("_", " ")
        if isinstance(value, dict):
            typer.echo(label)
            _tell(value, depth + 1)
        else:
            typer.echo(f"{label}: {value}")


# Last, for they import from here.
for _entry in entry_points(group=GROUP):
    app.command(_entry.name)(_entry.load())
