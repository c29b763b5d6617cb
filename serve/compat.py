"""`speechgpt chat --compat`: the original's console (SPEC 2.5) over one of our bundles."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from serve.chat import ChatError, sound_file
from serve.encoder import Refused
from serve.pipeline import Pipeline
from serve.prompting import Sampling, TooLong, Typed
from serve.vocoder import Line
from speechgpt.runtime.progress import Progress

if TYPE_CHECKING:
    from speechgpt.language.console import Part, Record

LOG = "responses.json"
"""JSON Lines in spite of its name, as the original writes it."""


@dataclass(frozen=True)
class Response:
    """wav: the spoken answer as a file's bytes. whole: whether the reply kept the form that was asked for and ended."""

    record: "Record"
    wav: bytes | None
    whole: bool


def run(
    bundle: str,
    recipe: str,
    runner: asyncio.Runner,
    output_dir: Path,
    ask: str | None,
    lines: Path | None,
    as_json: bool,
) -> None:
    """One line, the lines of a file, or a conversation. Raises ChatError; typer.Exit(1) if lines of a file failed."""
    from serve.bundles import find, open_bundle
    from serve.pipeline import OwnPipeline
    from speechgpt.recipe import load

    chosen = load(recipe)
    questions = None if lines is None else _questions(lines)
    opened = open_bundle(find(bundle, chosen.tracking.uri))
    console = Console(OwnPipeline(opened.directory, chosen.serving), Sampling(chosen.generation), runner)
    if questions is not None:
        answer_all(console, questions, output_dir, as_json)
    elif ask is not None:
        response = console.answer(ask)
        kept = keep(output_dir, response)
        typer.echo(json.dumps(response.record | {"audio": kept and str(kept)}) if as_json else _told(response, kept))
        _say_where(output_dir, as_json)
    else:
        converse(console, output_dir)


class Console:
    """The parts of a bundle, asked as the original's console asks."""

    def __init__(self, pipeline: Pipeline, sampling: Sampling, runner: asyncio.Runner) -> None:
        self._pipeline = pipeline
        self._sampling = sampling
        self._runner = runner

    def answer(self, line: str) -> Response:
        """Raises ChatError."""
        return self._runner.run(self._answer(line))

    async def _answer(self, line: str) -> Response:
        from speechgpt.language.answers import Answer
        from speechgpt.language.console import INPUT_MARK, record
        from speechgpt.speech.audio import SAMPLE_RATE

        parts = tuple([await self._part(part) for part in line.split(INPUT_MARK)])
        if isinstance(parts[-1], str) and not parts[-1].strip():
            raise ChatError(f"nothing to answer in {line!r}")
        try:
            reply = await self._pipeline.reply(Typed(parts, self._sampling))
        except ValueError as error:
            raise ChatError(str(error)) from None
        if isinstance(reply, TooLong):
            raise ChatError(f"{reply.tokens} tokens leave no room for an answer in the model's {reply.context}")
        answer = Answer(reply.transcript, reply.text, reply.units, reply.well_formed, reply.finish)
        wav = await self._pipeline.speak(Line(reply.units), "wav", SAMPLE_RATE) if reply.units else None
        return Response(record(parts, answer), wav, reply.well_formed)

    async def _part(self, text: str) -> "Part":
        file = sound_file(text)
        if file is None:
            return text
        try:
            heard = await self._pipeline.hear(file.read_bytes())
        except OSError as error:
            raise ChatError(f"{file}: {error.strerror}") from None
        if isinstance(heard, Refused):
            raise ChatError(f"{file}: {heard.reason}: {heard.detail}")
        return heard.units


def keep(output_dir: Path, response: Response) -> Path | None:
    """Append a response to `responses.json`, its sound as `wav/answer_N.wav`, N counting the lines before it.

    Returns the sound file. The sound comes first, so that no line is without its file.
    """
    log = output_dir / LOG
    (output_dir / "wav").mkdir(parents=True, exist_ok=True)
    number = log.read_bytes().count(b"\n") if log.is_file() else 0
    file = None
    if response.wav is not None:
        file = output_dir / "wav" / f"answer_{number}.wav"
        file.write_bytes(response.wav)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(response.record) + "\n")
    return file


def converse(console: Console, output_dir: Path) -> None:
    """Lines from standard input until `quit` or its end; an error ends its line only."""
    invitation = "Please talk with SpeechGPT:\n"
    while True:
        try:
            line = input(invitation)
        except (EOFError, KeyboardInterrupt):
            return
        invitation = "Please input prompts for SpeechGPT:\n"
        if line.strip() == "quit":
            return
        try:
            response = console.answer(line)
        except ChatError as error:
            typer.echo(f"error: {error}")
            continue
        typer.echo(_told(response, keep(output_dir, response)))
        _say_where(output_dir)


def answer_all(console: Console, questions: dict[int, str], output_dir: Path, as_json: bool) -> None:
    """Lines of a file by their numbers, in order. Lines that fail are named and leave no record; then the exit is 1."""
    failures: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    progress = Progress(silent=as_json)
    with progress.count("answering", len(questions), "lines") as counter:
        for number, line in questions.items():
            try:
                response = console.answer(line)
            except ChatError as error:
                failures.append({"line": number, "error": str(error)})
                progress.say(f"line {number}: {error}")
            else:
                file = keep(output_dir, response)
                answers.append({"line": number, "audio": file and str(file), "whole": response.whole})
            counter.advance()
    if as_json:
        typer.echo(json.dumps({"responses": str(output_dir / LOG), "answers": answers, "failures": failures}))
    else:
        broken = sum(not answer["whole"] for answer in answers)
        typer.echo(f"{len(answers)} lines answered, {broken} of them not in the form asked for, {len(failures)} failed")
        _say_where(output_dir)
    if failures:
        raise typer.Exit(1)


def _questions(file: Path) -> dict[int, str]:
    """The lines that hold something, by their numbers from 1. Raises ChatError."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"--input {file}: {error}") from None
    return {number: line for number, line in enumerate(lines, 1) if line.strip()}


def _told(response: Response, file: Path | None) -> str:
    record = response.record
    if record["textAnswer"]:
        lines = [f"Transcript: {record['textQuestion']}", f"Text response: {record['textAnswer']}"]
    else:
        lines = [f"Response:\n{record['answer']}"]
    if file:
        lines.append(f"Speech response is saved in {file}")
    if not response.whole:
        lines.append("(the reply broke off, or is not in the form that was asked for)")
    return "\n".join(lines)


def _say_where(output_dir: Path, silent: bool = False) -> None:
    if not silent:
        typer.echo(f"Response json is saved in {output_dir / LOG}")
