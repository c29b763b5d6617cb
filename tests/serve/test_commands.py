"""`speechgpt serve` and `speechgpt chat` as processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from speechgpt.speech.audio import encode

SPEECHGPT = [sys.executable, "-m", "speechgpt.cli"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SPEECHGPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_chat_answers_one_question_as_json(tiny_bundle: Path, tmp_path: Path) -> None:
    time_axis = np.arange(16_000) / 16_000
    recording = tmp_path / "question.wav"
    syllables = np.sin(2 * np.pi * 2 * time_axis) ** 2
    recording.write_bytes(encode((0.4 * syllables * np.sin(2 * np.pi * 300 * time_axis)).astype(np.float32), "wav"))
    done = run("chat", tiny_bundle, "--recipe", "tiny", "--output-dir", tmp_path / "out", "--ask", recording, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["question"] == str(recording) and answer["bundle"]


@pytest.mark.slow
def test_wrong_usage_and_missing_bundles(tmp_path: Path) -> None:
    assert run("chat", "--json").returncode == 2
    missing = run("serve", tmp_path / "nothing", "--recipe", "tiny", "--port", str(free_port()))
    assert missing.returncode == 1 and "no such directory" in missing.stderr
    public = run("serve", tmp_path, "--recipe", "tiny", "--host", "0.0.0.0")
    assert public.returncode == 1 and "SPEECHGPT_API_KEY" in public.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_serve_answers_with_the_key_and_ends_on_sigterm(tiny_bundle: Path) -> None:
    port = free_port()
    environment = os.environ | {"SPEECHGPT_API_KEY": "sk-secret"}
    limits = ["resources.object_store_bytes=200000000", "generation.max_new_tokens=20"]
    settings = [argument for limit in limits for argument in ("--set", limit)]
    command = [*SPEECHGPT, "serve", str(tiny_bundle), "--recipe", "tiny", *settings, "--port", str(port)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/readyz", process)
            models = f"http://127.0.0.1:{port}/v1/models"
            assert httpx.get(models).status_code == 401
            allowed = httpx.get(models, headers={"authorization": "Bearer sk-secret"})
            assert [model["id"] for model in allowed.json()["data"]] == ["tiny"]
            # The deployments are ready a moment before the command has seen it and takes signals.
            assert process.stderr is not None
            assert any("is served at" in line for line in process.stderr)
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def _wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    pytest.fail("the service did not become ready")
