"""Server processes that outlive the command that started them: one file with the process's number and birth each."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from speechgpt.runtime.stack.layout import HOST, StackError

START_SECONDS = 180.0
STOP_SECONDS = 30.0


def start(directory: Path, name: str, command: Sequence[str], environment: dict[str, str], port: int) -> None:
    """Start `command` in a session of its own and wait until it listens; its output goes to NAME.log.

    Does nothing if it runs already. Raises StackError if the port is another's or the process ends.
    """
    if running(directory, name):
        return
    if listens(port):
        raise StackError(f"{name}: port {port} is taken by another program; choose another with --{name}-port")
    log = directory / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    born = psutil.Process(process.pid).create_time()
    _file(directory, name).write_text(json.dumps({"pid": process.pid, "born": born}))
    deadline = time.monotonic() + START_SECONDS
    while not listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()[-5:]
            raise StackError("\n".join([f"{name} did not start; {log} says:", *said]))
        time.sleep(0.3)


def stop(directory: Path, name: str) -> bool:
    """End the process and those it started; False if it did not run."""
    process = running(directory, name)
    _file(directory, name).unlink(missing_ok=True)
    if process is None:
        return False
    family = [process, *process.children(recursive=True)]
    for member in family:
        _quietly(member.terminate)
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for member in left:
        _quietly(member.kill)
    return True


def running(directory: Path, name: str) -> psutil.Process | None:
    """The process that was started under this name, unless its number is another's by now."""
    try:
        noted = json.loads(_file(directory, name).read_text())
        process = psutil.Process(noted["pid"])
        alive = process.create_time() == noted["born"] and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.pid"


def _quietly(signal: Callable[[], None]) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        return
