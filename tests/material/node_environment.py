"""The official JavaScript client in a directory of its own, made on demand in this project's cache.

Nothing of it is in this repository: npm fetches it from wherever npm is configured to, and checks it.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from speechgpt.runtime import cache

OPENAI = "7.59.0"
"""Of the npm package `openai`."""


def openai_modules() -> Path:
    """A directory with the client in its node_modules. Skips the test where there is no npm, or no registry for it."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("node and npm are not installed")
    return cache.keep(f"openai-node-{OPENAI}", _install)


def _install(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", f"openai@{OPENAI}"]
    done = subprocess.run([*words, "--prefix", str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install openai {OPENAI} here: {done.stderr.strip()[-300:]}")
