"""Files on a node's own disk: made once for all of its processes, and not left behind by those that were killed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil


def directory() -> Path:
    """Where this user's processes on this node keep what they share."""
    path = Path(tempfile.gettempdir(), f"speechgpt-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by whichever process of the node comes first; the others wait for it.

    make: writes the file or directory that it is given, which gets its name when it is whole. If it raises, or its
    process dies, the next process tries.
    """
    partial = path.with_name(f"{path.name}.partial")
    # The kernel gives the lock back when its holder dies, so nobody waits for a killed process.
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            remove(partial)
            make(partial)
            partial.rename(path)
    return path


def forget(path: Path) -> None:
    """Remove what `made_once` made; every process may call it, when all are done with it."""
    remove(path)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def scratch(kind: str) -> Path:
    """A new empty directory of this process, to be removed by whoever is done with it.

    Those that killed processes left are removed first: a few checkpoints would fill a disk.
    """
    for left in directory().glob(f"{kind}-*"):
        owner = left.name.split("-")[-2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=directory()))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
