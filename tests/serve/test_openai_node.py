"""The official JavaScript client against a real Ray Serve."""

import json
import subprocess
from pathlib import Path

import pytest
from node_environment import openai_modules

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_javascript_client_gets_all_it_asks_for(service_url: str, clip: bytes, tmp_path: Path) -> None:
    """Chat, spoken and streamed chat, speech, transcriptions, models and errors; its own types throughout."""
    modules = openai_modules()
    recording = tmp_path / "question.wav"
    recording.write_bytes(clip)
    script = Path(__file__).with_name("openai_client.mjs")
    command = ["node", str(script), f"{service_url}/v1", "tiny", str(recording)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=modules)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"] and found["sound"] > 1000 and found["pieces"] > 0
