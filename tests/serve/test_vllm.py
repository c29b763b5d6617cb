"""The engine vLLM: its absence here, and all that it owes, in an environment that has it."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import vllm_environment

from serve import run
from serve.bundles import Source
from speechgpt import recipe

PROOFS = Path(__file__).parent


def test_without_the_extra_serve_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen = recipe.load("nano", ("serving.language.engine=vllm",))
    with pytest.raises(run.ServeError, match=r"pip install 'speechgpt-ray\[vllm\]'"):
        run.start(Source("nano", "", "", "nano", 0), chosen)


@pytest.mark.evidence
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("proofs", ["vllm_proofs.py", "vllm_service.py"])
def test_in_its_own_environment(proofs: str) -> None:
    try:
        python = vllm_environment.interpreter()
    except vllm_environment.NoIndexError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    words = [python, "-m", "pytest", "-x", "-q", "-o", "timeout=1200", PROOFS / proofs]
    done = subprocess.run(
        words, capture_output=True, text=True, env=vllm_environment.environment(), cwd=vllm_environment.ROOT
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
