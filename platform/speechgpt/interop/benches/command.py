"""`speechgpt bench NAME`: measure this machine against the published programs, in one run."""

import json as json_module
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from speechgpt.interop.benches.baseline import BenchError
from speechgpt.runtime.progress import Progress

GROUP = "speechgpt.benches"
"""Entry points of benchmarks that live elsewhere (`serve`): functions for Typer, in modules that import little."""
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


for _entry in entry_points(group=GROUP):
    app.command(_entry.name)(_entry.load())


@app.command()
def encode(clips: Clips = 200, threads: Threads = 1, seed: Seed = 0, json: Json = False) -> None:
    """Speech to units: HuBERT Base and 1000 centroids, against fairseq's own path."""
    from speechgpt.interop.benches.encode import run

    _show(run, clips, threads, seed, json)


@app.command()
def vocoder(clips: Clips = 200, threads: Threads = 1, seed: Seed = 0, json: Json = False) -> None:
    """Units to speech: the published CodeHiFiGAN, whole and streamed, against fairseq's own path."""
    from speechgpt.interop.benches.vocoder import run

    _show(run, clips, threads, seed, json)


def _show(run: Callable[..., dict[str, Any]], clips: int, threads: int, seed: int, json: bool) -> None:
    progress = Progress(silent=json)
    try:
        with tempfile.TemporaryDirectory() as folder, progress.count("measuring", clips, "clips") as counter:
            result = run(clips, threads, seed, Path(folder), counter.advance)
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
