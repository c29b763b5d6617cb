"""Real fairseq 0.12.2 in an environment of its own: what parity is proved against, and benchmarks compare with.

It shares this environment's torch and numpy, so that a difference is fairseq's and not theirs, and sees nothing else of
this project. Its own packages want versions that nothing here should have.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from speechgpt.runtime import cache

VERSION = "0.12.2"

_SHIM = Path(__file__).with_name("fairseq_on_python_311.py")
_PACKAGES = (
    f"fairseq=={VERSION}",
    # fairseq asks for hydra below 1.1, which Python 3.11 does not import.
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
    "sacrebleu==2.5.1",
    "portalocker",
    "tabulate",
    "colorama",
    "lxml",
    "bitarray",
)
"""Installed without their dependencies: the rest is shared."""


class FairseqEnvironmentError(RuntimeError):
    """The environment could not be made; the message holds what pip said."""


def interpreter() -> Path:
    """The environment's Python. Made once, in the cache (`runtime.cache`), which takes a minute and a C++ compiler.

    Scripts for it begin with `import fairseq_on_python_311`. Raises FairseqEnvironmentError.
    """
    return cache.keep(_name(), _build) / "bin" / "python"


def installed() -> bool:
    """Whether `interpreter` would answer at once."""
    return (cache.folder() / _name()).is_dir()


def environment() -> dict[str, str]:
    """Variables for a process of that Python: this project's own path is not in it."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def _name() -> str:
    """One for each set of packages and each torch that they share."""
    state = "\n".join((*_PACKAGES, sysconfig.get_path("purelib"), sys.version, _SHIM.read_text()))
    return f"fairseq-{VERSION}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"


def _build(folder: Path) -> None:
    _run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", *_PACKAGES)
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    shutil.copy(_SHIM, packages)
    _run(python, "-c", "import fairseq_on_python_311, fairseq.models.hubert")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise FairseqEnvironmentError(
            f"fairseq {VERSION}'s environment could not be made; `{' '.join(words[1:4])} …`:\n{done.stderr[-3000:]}"
        )
    return done.stdout
