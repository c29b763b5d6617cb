"""`speechgpt bench serve`: how soon a served answer is heard, against the original's way of answering, in one run."""

import asyncio
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

RATE = 24_000
TEXT = (
    "in the morning the old man walked to the river my sister looked at the market a small dog was waiting near an "
    "empty house and fell asleep"
)
_TOKENS_A_SECOND = 26
"""Units of the shipped encoder; other bundles give somewhat longer or shorter answers."""


@dataclass
class Listened:
    """One answer as a client heard it. chunks: seconds since it was asked for, and seconds of sound, of each piece.
    asked: `time.perf_counter()`."""

    chunks: list[tuple[float, float]] = field(default_factory=list)
    error: str | None = None
    asked: float = 0.0

    @property
    def first(self) -> float:
        return self.chunks[0][0]

    @property
    def sound(self) -> float:
        return sum(seconds for _, seconds in self.chunks)

    @property
    def taken(self) -> float:
        return self.chunks[-1][0]


def main(
    url: Annotated[str | None, typer.Option(help="A running service, instead of starting one.")] = None,
    bundle: Annotated[str, typer.Option(help="What to serve: directory, s3://…, models:/name@alias, shipped name.")] = (
        "nano"
    ),
    seconds: Annotated[
        float, typer.Option(min=1, help="Sound of each answer of a bundle; a --url says what it says.")
    ] = (10.0),
    text: Annotated[str, typer.Option(help="What is read aloud.")] = TEXT,
    requests: Annotated[int, typer.Option(min=2, help="Of each load and either side.")] = 8,
    rate: Annotated[float, typer.Option(min=0.01, help="Arrivals a second of the open-loop load.")] = 0.5,
    crowd: Annotated[int, typer.Option(min=1, help="Requests that come at the same moment.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe: serving.language.engine=vllm.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")] = False,
) -> None:
    """First audio and throughput of streamed answers, against generating all and then synthesising all, one request at
    a time: for a bundle transformers' `generate` and the vocoder in a process of their own, for a --url the service
    itself."""
    from serve.bench_service import served, talkative
    from serve.run import ServeError
    from speechgpt.recipe import RecipeError
    from speechgpt.runtime.bundle import BundleError
    from speechgpt.runtime.progress import Progress

    if url and set_:
        raise typer.BadParameter("--set is for a service that is started here, not for a --url")
    progress = Progress(silent=as_json)
    try:
        with progress.count("listening", 4 * requests + 2 * crowd, "answers") as counter:
            if url:
                result = asyncio.run(run(url, None, text, requests, rate, crowd, seed, counter.advance))
            else:
                tokens = round(seconds * _TOKENS_A_SECOND)
                with (
                    talkative(bundle) as parts,
                    served(parts, tokens, tuple(set_ or ())) as own,
                    Original(parts, tokens) as original,
                ):
                    result = asyncio.run(run(own, original, text, requests, rate, crowd, seed, counter.advance))
    except (RecipeError, ServeError, BundleError, BenchError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(
        f"first audio after {result['figure']} {result['unit']}; baseline {result['baseline']}: {result['ratio']} times"
    )
    for line in table(result["conditions"]["loads"]):
        typer.echo(line)


class BenchError(RuntimeError):
    """A service that gave no answer to measure."""


async def run(
    url: str,
    original: "Original | None",
    text: str,
    requests: int,
    rate: float,
    crowd: int,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """The result as `bench` prints it. Both sides read the same text under the same arrivals."""
    import os

    import httpx

    async with httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), timeout=600) as client:
        try:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise BenchError(f"{url}: no service of ours answers there ({error or type(error).__name__})") from None

        async def streamed() -> Listened:
            return await listen(client, {"model": model, "input": text, "voice": "default", "response_format": "pcm"})

        async def whole() -> Listened:
            if original:
                return await asyncio.to_thread(original.listen, text, next(seeds))
            return await listen(client, {"model": model, "input": text, "voice": "default", "response_format": "wav"})

        seeds = itertools.count(seed)
        for side in (streamed, whole):
            if problem := (await side()).error:
                raise BenchError(problem)
        loads: dict[str, dict[str, Any]] = {}
        plans = {
            "one at a time": (None, requests),
            f"{rate:g} arrivals a second": (arrivals(requests, rate, seed), requests),
            f"{crowd} at once": ([0.0] * crowd, crowd),
        }
        for name, (moments, count) in plans.items():
            ours = await under(streamed, moments, count, False, advance)
            theirs = await under(whole, moments, count, True, advance)
            loads[name] = {"streamed": summary(ours), "baseline": summary(theirs)}
    alone, many = loads["one at a time"], loads[f"{crowd} at once"]
    figure, baseline = (alone[side]["first_audio_p50"] for side in ("streamed", "baseline"))
    return {
        "figure": figure,
        "unit": "seconds to the first audio, median, one request at a time",
        "baseline": baseline,
        "ratio": round(baseline / figure, 2),
        "throughput_ratio": round(many["streamed"]["throughput"] / many["baseline"]["throughput"], 2),
        "conditions": {
            "service": url,
            "model": model,
            "seconds_of_answer": alone["streamed"]["seconds_of_answer"],
            "baseline": "as the original: one request at a time, generate all, then synthesise all; "
            + (f"transformers' generate, no server, {original.threads} threads" if original else "same service"),
            "load": round(os.getloadavg()[0], 1),
            "processors": os.cpu_count(),
            "loads": loads,
        },
    }


async def listen(client: "httpx.AsyncClient", body: dict[str, Any]) -> Listened:
    """Ask for speech and note when which sound comes. A wav is heard when it is whole."""
    import httpx

    heard, began = Listened(), time.perf_counter()
    try:
        async with client.stream("POST", "/v1/audio/speech", json=body) as reply:
            if not reply.is_success:
                heard.error = f"status {reply.status_code}: {(await reply.aread()).decode()[:200]}"
            elif body["response_format"] == "pcm":
                async for data in reply.aiter_raw():
                    heard.chunks.append((time.perf_counter() - began, len(data) / 2 / RATE))
            else:
                sound = _seconds(await reply.aread())
                heard.chunks.append((time.perf_counter() - began, sound))
    except httpx.HTTPError as error:
        heard.error = f"{type(error).__name__}: {error}"
    if not heard.chunks and not heard.error:
        heard.error = "no sound came"
    return heard


async def under(
    ask: Callable[[], Awaitable[Listened]],
    moments: Sequence[float] | None,
    count: int,
    in_turn: bool,
    advance: Callable[[int], None],
) -> list[Listened]:
    """`count` answers, asked for at the given moments (seconds; None: each when the one before has ended).

    in_turn: the service takes one request at a time; the time in its queue is part of the answer's.
    """
    turn = asyncio.Semaphore(1 if in_turn else count)
    began = time.perf_counter()

    async def at(moment: float) -> Listened:
        await asyncio.sleep(max(0.0, moment - (time.perf_counter() - began)))
        came = time.perf_counter()
        async with turn:
            waited = time.perf_counter() - came
            heard = await ask()
        heard.asked = came
        heard.chunks = [(when + waited, seconds) for when, seconds in heard.chunks]
        advance(1)
        return heard

    if moments is None:
        return [await at(0) for _ in range(count)]
    return list(await asyncio.gather(*map(at, moments)))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Moments, in seconds, of a Poisson process."""
    import numpy as np

    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def in_time(heard: Listened) -> list[bool]:
    """Of each chunk after the first, whether it came before a playback that began with the first had run dry."""
    played_until, results = heard.first, []
    for when, seconds in heard.chunks:
        results.append(when <= played_until)
        # A gap delays all that follows.
        played_until = max(played_until, when) + seconds
    return results[1:]


def summary(answers: Sequence[Listened]) -> dict[str, Any]:
    import numpy as np

    good = [heard for heard in answers if not heard.error]
    failed = [heard.error for heard in answers if heard.error]
    if not good:
        raise BenchError(f"every answer failed, the first with {failed[0]}")
    first = [heard.first for heard in good]
    lasted = max(heard.asked + heard.taken for heard in good) - min(heard.asked for heard in good)
    punctual = [ok for heard in good for ok in in_time(heard)]
    return {
        "first_audio_p50": round(float(np.percentile(first, 50)), 3),
        "first_audio_p95": round(float(np.percentile(first, 95)), 3),
        "whole_p50": round(float(np.median([heard.taken for heard in good])), 3),
        "real_time_factor": round(float(np.median([heard.taken / heard.sound for heard in good])), 3),
        "throughput": round(sum(heard.sound for heard in good) / lasted, 2),
        "chunks_in_time": round(float(np.mean(punctual)), 3) if punctual else None,
        "seconds_of_answer": round(float(np.mean([heard.sound for heard in good])), 2),
        "answers": len(good),
        "errors": len(failed),
    }


def table(loads: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: a load and side in each."""
    columns = ("first_audio_p50", "first_audio_p95", "whole_p50", "throughput", "chunks_in_time", "errors")
    lines = [f"{'':34}" + "".join(f"{name.replace('_', ' '):>18}" for name in columns)]
    for load, sides in loads.items():
        for side, facts in sides.items():
            values = ("-" if facts[name] is None else str(facts[name]) for name in columns)
            lines.append(f"{load + ', ' + side:34}" + "".join(f"{value:>18}" for value in values))
    return lines


def _seconds(sound: bytes) -> float:
    import soundfile

    facts = soundfile.info(io.BytesIO(sound))
    return facts.frames / facts.samplerate


class Original:
    """`serve.bench_original` as a process. Raises BenchError when it ends."""

    def __init__(self, bundle: Path, tokens: int) -> None:
        command = [sys.executable, "-m", "serve.bench_original", str(bundle), str(tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.threads = self._answer()["threads"]

    def listen(self, text: str, seed: int) -> Listened:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"text": text, "seed": seed}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Listened([(answer["taken"], answer["sound"])])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise BenchError("the baseline's process ended; what it said is above")
        return json.loads(line)

    def __enter__(self) -> "Original":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
