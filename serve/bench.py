"""`speechgpt bench serve`: how soon a served answer is heard, against the original's way of answering, in one run."""

import asyncio
import base64
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import httpx

RATE = 24_000
_TOKENS_A_SECOND = 26
"""Units of the shipped encoder; other bundles give somewhat longer or shorter answers."""


@dataclass(frozen=True)
class Asked:
    """A recording that is asked, or a text that is read aloud. form: by which a recording is answered."""

    recording: Path | None = None
    text: str = ""
    form: Literal["chain", "direct"] = "chain"

    def request(self, model: str, *, streamed: bool) -> tuple[str, dict[str, Any]]:
        """Route and body: sound as it is made, or a whole file."""
        if self.recording is None:
            format = "pcm" if streamed else "wav"
            body = {"model": model, "input": self.text, "voice": "default", "response_format": format}
            return "/v1/audio/speech", body
        sound = base64.b64encode(self.recording.read_bytes()).decode()
        part = {"type": "input_audio", "input_audio": {"data": sound, "format": self.recording.suffix[1:]}}
        return "/v1/chat/completions", {
            "model": model,
            "messages": [{"role": "user", "content": [part]}],
            "modalities": ["text", "audio"],
            "audio": {"voice": "default", "format": "pcm16" if streamed else "wav"},
            "reply_form": self.form,
            "stream": streamed,
        }


def questions() -> list[Path]:
    """Those that come with the package."""
    return [Path(str(file)) for file in sorted((resources.files("serve") / "questions").iterdir(), key=str)]


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
    question: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Sound files that are asked in turn; else eight questions of the package."),
    ] = None,
    text: Annotated[str, typer.Option(help="What is read aloud, instead of questions being asked.")] = "",
    form: Annotated[
        Literal["chain", "direct"], typer.Option(help="Questions answered by way of their transcript, or without it.")
    ] = "chain",
    requests: Annotated[int, typer.Option(min=2, help="Of each load and either side.")] = 8,
    rate: Annotated[float, typer.Option(min=0.01, help="Arrivals a second of the open-loop load.")] = 0.5,
    crowd: Annotated[int, typer.Option(min=1, help="Requests that come at the same moment.")] = 8,
    limit: Annotated[
        float, typer.Option(min=0.01, help="Seconds to the first sound of an answer that is good, if no piece is late.")
    ] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Where a picture of it is written (PNG, SVG or PDF).")] = None,
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
    if question and text:
        raise typer.BadParameter("--question is asked, --text is read aloud: one of them")
    if form != "chain" and text:
        raise typer.BadParameter("--form is of answers to questions, not of a --text")
    asked = [Asked(text=text)] if text else [Asked(file, form=form) for file in question or questions()]
    plan = Plan(asked, requests, rate, crowd, limit, seed)
    progress = Progress(silent=as_json)
    try:
        # Ray prints here what replicas print, and DeepSpeed, which transformers imports, talks.
        with redirect_stdout(sys.stderr), progress.count("listening", 4 * requests + 2 * crowd, "answers") as counter:
            if url:
                result, heard = asyncio.run(run(url, None, plan, counter.advance))
            else:
                tokens = round(seconds * _TOKENS_A_SECOND)
                with (
                    talkative(bundle) as parts,
                    served(parts, tokens, tuple(set_ or ())) as own,
                    Original(parts, tokens) as original,
                ):
                    result, heard = asyncio.run(run(own, original, plan, counter.advance))
    except (RecipeError, ServeError, BundleError, BenchError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if plot:
        from serve.bench_plot import draw

        draw(heard, plot)
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


@dataclass(frozen=True)
class Plan:
    """What both sides are asked: the recordings or texts in turn, under the same arrivals. See `main`."""

    asked: Sequence[Asked]
    requests: int
    rate: float
    crowd: int
    limit: float
    seed: int


Heard = dict[str, dict[str, list[Listened]]]
"""By load and side, the answers."""


async def run(
    url: str, original: "Original | None", plan: Plan, advance: Callable[[int], None]
) -> tuple[dict[str, Any], Heard]:
    """The result as `bench` prints it, and the answers that it is made of."""
    import os

    import httpx

    async with httpx.AsyncClient(base_url=url.rstrip("/").removesuffix("/v1"), timeout=600) as client:
        try:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise BenchError(f"{url}: no service of ours answers there ({error or type(error).__name__})") from None

        async def streamed(asked: Asked) -> Listened:
            return await listen(client, *asked.request(model, streamed=True))

        async def whole(asked: Asked) -> Listened:
            if original:
                return await asyncio.to_thread(original.listen, asked, next(seeds))
            return await listen(client, *asked.request(model, streamed=False))

        seeds = itertools.count(plan.seed)
        for side in (streamed, whole):
            if problem := (await side(plan.asked[0])).error:
                raise BenchError(problem)
        heard: Heard = {}
        moments: dict[str, Sequence[float | None]] = {
            "one at a time": [None] * plan.requests,
            f"{plan.rate:g} arrivals a second": arrivals(plan.requests, plan.rate, plan.seed),
            f"{plan.crowd} at once": [0.0] * plan.crowd,
        }
        for name, each in moments.items():
            ours = await under(streamed, plan.asked, each, False, advance)
            heard[name] = {"streamed": ours, "baseline": await under(whole, plan.asked, each, True, advance)}
    loads = {
        name: {side: summary(answers, plan.limit) for side, answers in sides.items()} for name, sides in heard.items()
    }
    alone, many = loads["one at a time"], loads[f"{plan.crowd} at once"]
    figure, baseline = (alone[side]["first_audio_p50"] for side in ("streamed", "baseline"))
    result = {
        "figure": figure,
        "unit": "seconds to the first audio, median, one request at a time",
        "baseline": baseline,
        "ratio": round(baseline / figure, 2),
        "throughput_ratio": round(many["streamed"]["throughput"] / many["baseline"]["throughput"], 2),
        "conditions": {
            "service": url,
            "model": model,
            "asked": f"recordings, {plan.asked[0].form}" if plan.asked[0].recording else "a text to read",
            "seconds_of_answer": alone["streamed"]["seconds_of_answer"],
            "limit": plan.limit,
            "baseline": "as the original: one request at a time, generate all, then synthesise all; "
            + (f"transformers' generate, no server, {original.threads} threads" if original else "same service"),
            "load": round(os.getloadavg()[0], 1),
            "processors": os.cpu_count(),
            "loads": loads,
        },
    }
    return result, heard


async def listen(client: "httpx.AsyncClient", path: str, body: dict[str, Any]) -> Listened:
    """Ask and note when which sound comes. A wav is heard when it is whole."""
    import httpx

    heard, began = Listened(), time.perf_counter()
    try:
        async with client.stream("POST", path, json=body) as reply:
            if not reply.is_success:
                heard.error = f"status {reply.status_code}: {(await reply.aread()).decode()[:200]}"
            elif body.get("stream"):
                async for line in reply.aiter_lines():
                    if sound := _sound_of(line):
                        heard.chunks.append((time.perf_counter() - began, len(sound) / 2 / RATE))
                    elif '"error"' in line:
                        heard.error = line[:200]
            elif body.get("response_format") == "pcm":
                async for data in reply.aiter_raw():
                    heard.chunks.append((time.perf_counter() - began, len(data) / 2 / RATE))
            else:
                whole = await reply.aread()
                if "messages" in body:
                    whole = base64.b64decode(json.loads(whole)["choices"][0]["message"]["audio"]["data"])
                heard.chunks.append((time.perf_counter() - began, _seconds(whole)))
    except httpx.HTTPError as error:
        heard.error = f"{type(error).__name__}: {error}"
    if not heard.chunks and not heard.error:
        heard.error = "no sound came"
    return heard


def _sound_of(line: str) -> bytes:
    """Of a line of a streamed chat answer."""
    if not line.startswith("data: {"):
        return b""
    choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
    audio = choices[0].get("delta", {}).get("audio") or {}
    return base64.b64decode(audio.get("data") or "")


async def under(
    ask: Callable[[Asked], Awaitable[Listened]],
    asked: Sequence[Asked],
    moments: Sequence[float | None],
    in_turn: bool,
    advance: Callable[[int], None],
) -> list[Listened]:
    """An answer for each moment (seconds; None: when the one before has ended), to what is `asked` in turn.

    in_turn: the service takes one request at a time; the time in its queue is part of the answer's.
    """
    turn = asyncio.Semaphore(1 if in_turn else len(moments))
    began = time.perf_counter()

    async def at(moment: float, what: Asked) -> Listened:
        await asyncio.sleep(max(0.0, moment - (time.perf_counter() - began)))
        came = time.perf_counter()
        async with turn:
            waited = time.perf_counter() - came
            heard = await ask(what)
        heard.asked = came
        heard.chunks = [(when + waited, seconds) for when, seconds in heard.chunks]
        advance(1)
        return heard

    one_by_one, all_at = [], []
    for moment, what in zip(moments, itertools.cycle(asked), strict=False):
        if moment is None:
            one_by_one.append(await at(0, what))
        else:
            all_at.append(at(moment, what))
    return [*one_by_one, *await asyncio.gather(*all_at)]


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


def summary(answers: Sequence[Listened], limit: float) -> dict[str, Any]:
    """limit: see `main`."""
    import numpy as np

    good = [heard for heard in answers if not heard.error]
    failed = [heard.error for heard in answers if heard.error]
    if not good:
        raise BenchError(f"every answer failed, the first with {failed[0]}")
    first = [heard.first for heard in good]
    lasted = max(heard.asked + heard.taken for heard in good) - min(heard.asked for heard in good)
    punctual = [ok for heard in good for ok in in_time(heard)]
    viable = sum(heard.first <= limit and all(in_time(heard)) for heard in good)
    return {
        "first_audio_p50": round(float(np.percentile(first, 50)), 3),
        "first_audio_p95": round(float(np.percentile(first, 95)), 3),
        "first_audio_p99": round(float(np.percentile(first, 99)), 3),
        "whole_p50": round(float(np.median([heard.taken for heard in good])), 3),
        "real_time_factor": round(float(np.median([heard.taken / heard.sound for heard in good])), 3),
        "throughput": round(sum(heard.sound for heard in good) / lasted, 2),
        "goodput": round(viable / lasted, 3),
        "chunks_in_time": round(float(np.mean(punctual)), 3) if punctual else None,
        "seconds_of_answer": round(float(np.mean([heard.sound for heard in good])), 2),
        "answers": len(good),
        "errors": len(failed),
    }


def table(loads: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table: a load and side in each."""
    columns = {
        "first_audio_p50": "first audio p50",
        "first_audio_p95": "p95",
        "first_audio_p99": "p99",
        "whole_p50": "whole p50",
        "throughput": "sound/s",
        "goodput": "good/s",
        "chunks_in_time": "in time",
        "errors": "errors",
    }
    lines = [f"{'':34}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns.values())]
    for load, sides in loads.items():
        for side, facts in sides.items():
            values = ("-" if facts[name] is None else str(facts[name]) for name in columns)
            widths = (max(9, len(name) + 2) for name in columns.values())
            cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
            lines.append(f"{load + ', ' + side:34}" + "".join(cells))
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

    def listen(self, asked: Asked, seed: int) -> Listened:
        assert self._process.stdin
        told = {"text": asked.text, "recording": str(asked.recording or ""), "form": asked.form, "seed": seed}
        self._process.stdin.write(json.dumps(told) + "\n")
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
