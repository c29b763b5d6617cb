"""vLLM's processes end with the replica that started them, also when that is killed; vLLM itself lets them live on."""

import os
import threading
import time

import psutil

OWNER_VARIABLE = "SPEECHGPT_VLLM_OWNER"
"""Process id of the replica, in the environment of vLLM's processes."""
_LOOK_SECONDS = 1.0


def end_with_owner() -> None:
    """Called in a process of vLLM: it and those between it and its owner are killed as soon as that is gone."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    between: list[psutil.Process] = []
    for process in psutil.Process().parents():
        if process.pid == owner:
            threading.Thread(target=_watch, args=(process, between), name="owner", daemon=True).start()
            return
        between.append(process)


def _watch(owner: psutil.Process, between: list[psutil.Process]) -> None:
    while _lives(owner):
        time.sleep(_LOOK_SECONDS)
    for process in between:
        if process.is_running():
            process.kill()
    os._exit(1)


def _lives(process: psutil.Process) -> bool:
    try:
        # A process id that is used anew is another process to psutil.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
