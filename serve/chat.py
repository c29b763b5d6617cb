"""`speechgpt chat`: talk to a running service, or to a bundle without one, in the manner of the original's console."""

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

SOUND_FILES = {".wav", ".flac", ".mp3", ".mp4", ".m4a", ".ogg", ".opus"}
INPUT_MARK = "is input:"
_HINT = """Type a question, or the path of a sound file that holds one.
`Recognize this speech, this is input: FILE` writes a recording down.
`Read this aloud, this is input: TEXT` speaks a text.
`quit` ends."""


class ChatError(RuntimeError):
    """A question that got no answer; the message is the service's own, or says what could not be reached."""


@dataclass(frozen=True)
class Spoken:
    """A recorded question, or recording to be written down."""

    file: Path
    dictation: bool


@dataclass(frozen=True)
class Written:
    """A typed question, or text to be read aloud."""

    text: str
    reading: bool


@dataclass(frozen=True)
class Answer:
    """transcript: what the model heard; text: what it answered; wav: how it said that, as a file's bytes."""

    transcript: str | None
    text: str | None
    wav: bytes | None
    bundle: str


def main(
    bundle: Annotated[str, typer.Argument(help="Directory, s3://…, models:/name@alias, or shipped name.")] = "nano",
    url: Annotated[
        str | None, typer.Option(help="A running service, instead of a bundle: http://127.0.0.1:8000")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose `serving` and `generation` sections hold.")] = "nano",
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output", help="Where answers are kept.")] = Path(
        "output"
    ),
    ask: Annotated[
        str | None, typer.Option(help="One question, typed or a sound file, instead of a conversation.")
    ] = None,
    compat: Annotated[
        bool, typer.Option("--compat", help="As the original's console: its prompts, its `responses.json`.")
    ] = False,
    lines: Annotated[
        Path | None, typer.Option("--input", help="With --compat: a file with one question a line.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --ask or --input: print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Talk to a service or a bundle."""
    from speechgpt.recipe import RecipeError
    from speechgpt.runtime.bundle import BundleError
    from speechgpt.runtime.tracking import TrackingError

    if as_json and ask is None and lines is None:
        raise typer.BadParameter("--json needs --ask or --input", param_hint="--json")
    if lines is not None and (not compat or ask is not None):
        raise typer.BadParameter("--input needs --compat, and goes without --ask", param_hint="--input")
    if compat and url:
        raise typer.BadParameter("--compat asks a bundle in this process; a service gives no units", param_hint="--url")
    with asyncio.Runner() as runner:
        try:
            if compat:
                from serve.compat import run

                run(bundle, recipe, runner, output_dir, ask, lines, as_json)
                return
            client = _service(url) if url else _bundle(bundle, recipe)
            partner = Partner(client, runner)
            if ask is not None:
                answer = partner.answer(understand(ask))
                record = keep(output_dir, ask, answer)
                typer.echo(json.dumps(record) if as_json else told(answer, record, output_dir))
            else:
                converse(partner, output_dir, lambda: input("> "))
        except (ChatError, RecipeError, BundleError, TrackingError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from None


def converse(partner: "Partner", output_dir: Path, read_line: Callable[[], str]) -> None:
    """Questions and answers until `quit` or the end of input; an error ends its question only."""
    typer.echo(f"Please talk with SpeechGPT.\n{_HINT}")
    while True:
        try:
            line = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "quit":
            return
        if not line:
            continue
        try:
            answer = partner.answer(understand(line))
        except ChatError as error:
            typer.echo(f"error: {error}")
            continue
        typer.echo(told(answer, keep(output_dir, line, answer), output_dir))


def understand(line: str) -> Spoken | Written:
    """The original's reading of a line: a sound file alone is a spoken question; what follows `is input:` is to be
    recognised if it is a sound file, and read aloud if it is text.

    Raises ChatError for what looks like a sound file but is not there.
    """
    instruction, mark, given = line.rpartition(INPUT_MARK)
    if file := sound_file(given):
        return Spoken(file, dictation=bool(mark))
    return Written(given.strip(), reading=bool(mark and instruction.strip()))


def sound_file(text: str) -> Path | None:
    """The sound file that a piece of a line names, or None where it is text.

    Raises ChatError for what looks like a sound file but is not there.
    """
    given = text.strip()
    file = Path(given).expanduser()
    if file.suffix.lower() not in SOUND_FILES:
        return None
    if file.is_file():
        return file
    if " " not in given:
        raise ChatError(f"{given}: no such file")
    return None


def told(answer: Answer, record: dict[str, Any], output_dir: Path) -> str:
    """What is printed of an answer."""
    lines = []
    if answer.transcript:
        lines.append(f"Transcript: {answer.transcript}")
    if answer.text:
        lines.append(f"Text response: {answer.text}")
    if record["audio"]:
        lines.append(f"Speech response is saved in {output_dir / record['audio']}")
    lines.append(f"Response json is saved in {output_dir / 'responses.jsonl'}")
    return "\n".join(lines)


def keep(output_dir: Path, question: str, answer: Answer) -> dict[str, Any]:
    """Append the answer to `responses.jsonl`, its sound beside it as `wav/answer_N.wav`; returns the line."""
    log = output_dir / "responses.jsonl"
    (output_dir / "wav").mkdir(parents=True, exist_ok=True)
    number = len(log.read_text("utf-8").splitlines()) if log.is_file() else 0
    audio = None
    if answer.wav is not None:
        audio = f"wav/answer_{number}.wav"
        (output_dir / audio).write_bytes(answer.wav)
    facts = asdict(answer)
    del facts["wav"]
    record = {"question": question, **facts, "audio": audio}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return record


class Partner:
    """The service at the other end of `client`, over the network or in this process."""

    def __init__(self, client: "httpx.AsyncClient", runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner
        self._model = self._request("GET", "/v1/models").json()["data"][0]["id"]

    def answer(self, question: Spoken | Written) -> Answer:
        """Raises ChatError."""
        match question:
            case Spoken(file, dictation=True):
                form = {"model": self._model, "response_format": "json"}
                reply = self._request("POST", "/v1/audio/transcriptions", data=form, files={"file": file.read_bytes()})
                return Answer(None, reply.json()["text"], None, _digest(reply))
            case Written(text, reading=True):
                body = {"model": self._model, "input": text, "voice": "default", "response_format": "wav"}
                reply = self._request("POST", "/v1/audio/speech", json=body)
                return Answer(None, None, reply.content, _digest(reply))
            case Written(text):
                return self._chat(text)
            case Spoken(file):
                data = base64.b64encode(file.read_bytes()).decode()
                return self._chat([{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}])

    def _chat(self, content: str | list[dict[str, Any]]) -> Answer:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "modalities": ["text", "audio"],
            "audio": {"voice": "default", "format": "wav"},
        }
        reply = self._request("POST", "/v1/chat/completions", json=body)
        message, heard = reply.json()["choices"][0]["message"], reply.json()["speechgpt"]["question_transcript"]
        if audio := message["audio"]:
            return Answer(heard, audio["transcript"], base64.b64decode(audio["data"]), _digest(reply))
        return Answer(heard, message["content"], None, _digest(reply))

    def _request(self, method: str, path: str, **content: Any) -> "httpx.Response":
        import httpx

        try:
            reply = self._runner.run(self._client.request(method, path, **content))
        except httpx.HTTPError as error:
            raise ChatError(f"{self._client.base_url}: {error or type(error).__name__}") from None
        if reply.is_success:
            return reply
        try:
            raise ChatError(reply.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            raise ChatError(f"{self._client.base_url} is no service of ours: status {reply.status_code}") from None


def _service(url: str) -> "httpx.AsyncClient":
    import os

    import httpx

    from serve.keys import KEY_VARIABLE

    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url.removesuffix("/").removesuffix("/v1"), headers=headers, timeout=600)


def _bundle(address: str, recipe_name: str) -> "httpx.AsyncClient":
    """The gateway's own application over models in this process: a bundle answers here as it would when served."""
    import httpx

    from serve.bundles import find, open_bundle, required_signers
    from serve.gateway import create_app
    from serve.memory import OwnMemory
    from serve.pipeline import OwnPipeline
    from serve.service import Served, Service
    from speechgpt.recipe import load

    chosen = load(recipe_name)
    source = find(address, chosen.tracking.uri, required_signers(chosen.serving))
    serving = chosen.serving
    pipeline = OwnPipeline(open_bundle(source).directory, serving)
    memory = OwnMemory(serving.memory_seconds, serving.memory_answers)
    service = Service(Served(source.name, source.digest, source.created), pipeline, memory, serving, chosen.generation)
    app = create_app(lambda: service, list, serving, None)
    return httpx.AsyncClient(base_url="http://bundle", transport=httpx.ASGITransport(app), timeout=600)


def _digest(reply: "httpx.Response") -> str:
    return reply.headers.get("x-speechgpt-bundle", "")
