"""`demo`: from nothing to a spoken answer.

Runs the pipeline, serves its bundle, and asks it aloud a question that it has never heard. Run again it redoes no
finished job: only the service is started and asked anew.
"""

import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import typer

from jobs.pipeline import Cost, measured, run_pipeline, show
from jobs.publish import bundle_path
from jobs.shell import JobError, JsonOption, RecipeOption, SetOption, WorkspaceOption, verb
from speechgpt.recipe import load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.evaluation.listening import Utterance

_REPLY = "reports/demo-answer.wav"
_QUESTION = "reports/demo-question.flac"
_LOG = "reports/demo-serve.log"
_READY_SECONDS = 300
_REPLY_SECONDS = 120
_STOP_SECONDS = 60
_SHOWN_OUTPUT = 3000
"""Characters of the service's output in an error."""
_STAGE_COLUMNS = {
    "typed_answer_accuracy": "typed answers right",
    "recognition_wer": "recognition WER",
    "recognition_wer_strangers": "… voices never heard",
    "answer_accuracy": "spoken answers right",
    "unit_perplexity": "unit perplexity",
}


@dataclass(frozen=True)
class Conversation:
    """One question over HTTP, and what came back. seconds: from request to the whole reply."""

    question: str
    speaker: str
    wanted: str | None
    transcript: str
    bundle: str
    seconds: float


def demo(
    recipe: RecipeOption = "nano", workspace: WorkspaceOption = "", set: SetOption = None, json: JsonOption = False
) -> None:
    import ray

    with verb(json) as answer:
        chosen = load(recipe, tuple(set or ()))
        place = Workspace(workspace or f"runs/{chosen.name}")
        progress = Progress(silent=json)
        steps = run_pipeline(chosen, place, json, lambda step: None)
        # The service brings its own cluster; two would not fit beside each other on a laptop.
        ray.shutdown()
        with measured() as cost:
            said = converse(place, bundle_path(chosen), recipe, tuple(set or ()), progress)
        figures = place.read_json("reports/evaluation.json")
        files = {"answer": _REPLY, "question": _QUESTION, "report": "reports/evaluation.html"}
        files = {name: file for name, file in files.items() if place.exists(file)}
        if json:
            metrics = {name: value for name, value in figures.items() if name != "detail"}
            paths = {name: place.path(file) for name, file in files.items()}
            answer(
                {
                    "steps": [asdict(step) for step in steps],
                    "figures": metrics,
                    "conversation": asdict(said),
                    "files": paths,
                }
            )
        else:
            show(steps)
            show_conversation(figures, said, {name: place.path(file) for name, file in files.items()}, cost)


def converse(
    workspace: Workspace, bundle: str, recipe: str, overrides: tuple[str, ...], progress: Progress
) -> Conversation:
    """Serve the workspace's bundle, ask it one held-out question aloud, keep the spoken reply, and stop the service."""
    asked = held_out_question(workspace)
    workspace.write_bytes(_QUESTION, asked.sound)
    progress.say(f"serving {workspace.path(bundle)}")
    with workspace.fetch(bundle) as directory, serving(str(directory), recipe, overrides, workspace) as url:
        said, sound = ask(url, asked)
    if sound is None:
        workspace.delete(_REPLY)
        progress.say("the reply has no speech")
    else:
        workspace.write_bytes(_REPLY, sound)
    return said


def held_out_question(workspace: Workspace) -> "Utterance":
    """The first by id of the questions of the evaluation in a voice that training heard: not chosen for its answer."""
    from jobs.utterances import workspace_utterances

    for utterance in workspace_utterances(workspace):
        if utterance.group == "seen":
            return utterance
    raise JobError(f"{workspace.uri}: no held-out question is there to ask; evaluation.questions says how many")


@contextmanager
def serving(bundle: str, recipe: str, overrides: tuple[str, ...], workspace: Workspace) -> Iterator[str]:
    """`speechgpt serve` as a process of its own while the block lasts; yields its URL once every deployment is warm.

    Raises JobError, with the end of what it printed, if it does not get there.
    """
    port = _free_port()
    settings = [word for override in overrides for word in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "speechgpt.cli",
        "serve",
        bundle,
        "--recipe",
        recipe,
        *settings,
        "--port",
        str(port),
    ]
    # Its cluster is its own, wherever the jobs ran, and it opens the bundle by path.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0)
        try:
            _await_ready(process, f"http://127.0.0.1:{port}/readyz", output)
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGINT)
            process.wait(_STOP_SECONDS)
        finally:
            # The process and what is left of its cluster, if it did not end as it was asked to.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            workspace.write_bytes(_LOG, output.read())


def ask(url: str, asked: "Utterance") -> tuple[Conversation, bytes | None]:
    """Put a spoken question to `/v1/chat/completions`, as any OpenAI client does; gives the reply's WAV, if any."""
    import httpx

    body = {
        "model": _served_model(url),
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "wav"},
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "input_audio",
                        "input_audio": {"data": base64.b64encode(asked.sound).decode(), "format": "flac"},
                    }
                ],
            }
        ],
    }
    began = time.monotonic()
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=_REPLY_SECONDS)
    if response.status_code != httpx.codes.OK:
        raise JobError(f"the service answered {response.status_code}: {response.text[:500]}")
    message = response.json()["choices"][0]["message"]
    # A model that has hardly been trained may not get as far as speaking; its reply is then text alone.
    audio = message["audio"] or {"transcript": message["content"] or "", "data": None}
    said = Conversation(
        question=asked.text or "",
        speaker=asked.speaker,
        wanted=asked.answer,
        transcript=audio["transcript"],
        bundle=response.headers["x-speechgpt-bundle"],
        seconds=round(time.monotonic() - began, 2),
    )
    return said, None if audio["data"] is None else base64.b64decode(audio["data"])


def show_conversation(figures: dict[str, Any], said: Conversation, files: dict[str, str], cost: Cost) -> None:
    """Metrics, question and answer, and where to listen and read on: the end of the demo, on standard output."""
    from rich.console import Console
    from rich.table import Table

    from speechgpt.evaluation.summary import tables, written

    console = Console()
    metrics, *_ = tables(figures["detail"])
    console.print(metrics)
    stages = Table("the model after", *_STAGE_COLUMNS.values(), title="stage by stage")
    for stage, scores in figures["detail"]["stages"].items():
        stages.add_row(stage, *(written(scores[key])[0] for key in _STAGE_COLUMNS))
    console.print(stages)
    talk = Table.grid(padding=(0, 2))
    talk.add_row("asked aloud", f"{said.question!r}, by {said.speaker}")
    talk.add_row("answered aloud", f"{said.transcript!r} in {said.seconds} s (right: {said.wanted!r})")
    talk.add_row("bundle", said.bundle)
    for name, path in files.items():
        talk.add_row(name, path)
    cpu = "" if cost.cpu is None else f", {cost.cpu / 60:.2f} CPU-minutes"
    talk.add_row("serving and asking", f"{cost.wall:.0f} s{cpu}")
    console.print(talk, soft_wrap=True)


def _served_model(url: str) -> str:
    import httpx

    return str(httpx.get(f"{url}/v1/models", timeout=_REPLY_SECONDS).json()["data"][0]["id"])


def _await_ready(process: "subprocess.Popen[bytes]", url: str, output: IO[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise JobError(f"the service ended before it was ready:\n{_tail(output)}")
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    raise JobError(f"the service was not ready within {_READY_SECONDS} s:\n{_tail(output)}")


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")[-_SHOWN_OUTPUT:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
main.command("demo", help=__doc__)(demo)

if __name__ == "__main__":
    main()
