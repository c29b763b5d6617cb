"""Row 8 of the matrix: `speechgpt serve` as a process that is told to go."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from load import QUESTION

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

TOKENS = 1500


def test_sigterm_ends_a_service_and_no_answer(
    endless_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGTERM while an answer is heard: it is heard to its end, and the process ends by itself, with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ("serving.request_timeout_seconds=120", "generation.max_new_tokens=100000", f"serving.port={port}")
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "speechgpt.cli", "serve", str(endless_bundle), "--recipe", "tiny", *words]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        # Until it says so, a signal ends a start.
        while not (_ready(url) and "is served at" in (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        body = {"model": "endless", "messages": [{"role": "user", "content": QUESTION}], "stream": True,
                "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"},
                "max_completion_tokens": TOKENS}  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=240) as reply:
            lines = (line for line in reply.iter_lines() if line)
            heard = [next(lines)]
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            heard += lines
        record_property("seconds that it was heard after the signal", round(time.monotonic() - told, 1))
        assert heard[-1] == "data: [DONE]"
        finish = json.loads(heard[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert finish == "length"
        assert process.wait(180) == 0, (tmp_path / "log").read_text()[-3000:]
        record_property("seconds until the process was gone", round(time.monotonic() - told, 1))
    finally:
        if process.poll() is None:
            process.kill()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
