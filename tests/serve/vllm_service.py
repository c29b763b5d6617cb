"""A bundle on Ray Serve whose replies vLLM generates; run by test_vllm.py in an environment that has it."""

import base64
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from serve.bundles import find
from speechgpt import recipe

QUESTION = [{"role": "user", "content": "what is two plus three"}]


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    from ray import serve

    from serve import run

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ("language.engine=vllm", f"port={port}", *(f"{part}.max_replicas=1" for part in PARTS))
    source = find("nano", "")
    run.start(source, recipe.load("nano", tuple(f"serving.{setting}" for setting in settings)))
    yield f"http://127.0.0.1:{port}"
    run.stop(source)
    serve.shutdown()
    _wait(lambda: not _vllm(), "vLLM's processes outlive the service")


PARTS = ("gateway", "encoder", "language", "vocoder")


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def test_it_answers_in_text_and_sound(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0)
    assert said.choices[0].message.content
    whole = client.chat.completions.create(
        model="nano",
        messages=QUESTION,
        temperature=0,
        modalities=["text", "audio"],
        audio={"voice": "default", "format": "wav"},
    )
    assert whole.choices[0].message.audio
    assert base64.b64decode(whole.choices[0].message.audio.data)[:4] == b"RIFF"


def test_sound_streams(url: str) -> None:
    body = {"model": "nano", "input": "two plus three is five", "voice": "default", "response_format": "pcm"}
    with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=120) as reply:
        assert reply.is_success
        sizes = [len(piece) for piece in reply.iter_raw()]
    assert len(sizes) > 1 and sum(sizes) > 24_000


def test_a_killed_replica_leaves_no_vllm_behind(client: openai.OpenAI) -> None:
    before = _vllm()
    [replica] = [p for p in psutil.process_iter(["cmdline"]) if "LanguageModel" in " ".join(p.info["cmdline"] or ())]
    assert before
    replica.kill()
    _wait(lambda: not any(process.is_running() for process in before), "vLLM outlives the replica that started it")

    def answers() -> bool:
        try:
            return bool(client.chat.completions.create(model="nano", messages=QUESTION, temperature=0).choices)
        except openai.APIError:
            return False

    _wait(answers, "no new replica answers", seconds=400)


def _vllm() -> list[psutil.Process]:
    """vLLM's own processes on this machine that belong to this cluster."""
    return [p for p in psutil.process_iter(["cmdline"]) if "VLLM::" in " ".join(p.info["cmdline"] or ())]


def _wait(condition, trouble: str, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, trouble
        time.sleep(0.5)
