"""Hosts of their own on this machine: Linux namespaces with their own network, processes and /tmp/ray.

What runs on one sees no process, port or Ray of another, or of this machine; files it shares. `ray stop` there stops
only what runs there, and a host that is killed takes everything on it along, as a machine does.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("unshare", "nsenter", "ip", "mount")


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(absent)} (apt-get install util-linux iproute2)"
    done = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    return done.stderr.strip()


_MISSING = missing()
MARKS = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(bool(_MISSING), reason=f"no hosts here: {_MISSING}"),
]
"""Of proofs that need hosts."""


def environment(scratch: Path, *modules: Path) -> dict[str, str]:
    """Of every node and of who submits, as the image sets it, without what this machine's own environment says.

    With a token of its own, in a file; modules: further directories that Python finds modules in.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    file = scratch / "token"
    file.write_text(secrets.token_hex(16))
    file.chmod(0o600)
    return kept | {
        # `python` on a node is the one that runs Ray.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT, *modules))),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(file),
        "RAY_USAGE_STATS_ENABLED": "0",
        # The tests of a busy machine fail on what the programs do, not on how long Ray takes to start.
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
        "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "240",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
    }


class Host:
    """One host, until `kill`. `address` is "" until it is plugged in."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self.address = ""
        ray = scratch / f"ray-of-{name}"
        ray.mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        start = f"ip link set lo up && mount --bind {ray} /tmp/ray && echo up && exec sleep infinity"
        command = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "sh", "-c", start]
        self._unshare = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._unshare.stdout
        assert self._unshare.stdout.readline() == "up\n", f"host {name} did not start"
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        self.pid = int(children.split()[0])
        """Of its first process, in this machine's numbers."""

    def entered(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` on it."""
        return ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--", *words]

    def run(self, *words: str, timeout: float = 600, **settings: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.entered(words), capture_output=True, text=True, timeout=timeout, **settings)

    def start(self, *words: str, log: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        with log.open("ab") as output:
            return subprocess.Popen(self.entered(words), stdout=output, stderr=output, env=env)

    def kill(self) -> None:
        """Everything on it at once, by signal 9."""
        self._unshare.kill()
        self._unshare.wait()


def plug(switch: Host, hosts: Sequence[Host], network: str = "10.77.0") -> None:
    """Connect hosts through a bridge on `switch`, with the addresses NETWORK.1, NETWORK.2 …"""
    _checked(switch.run("ip", "link", "add", "bridge", "type", "bridge"))
    _checked(switch.run("ip", "link", "set", "bridge", "up"))
    for number, host in enumerate(hosts, start=1):
        connect(switch, host, f"{network}.{number}")


def connect(switch: Host, host: Host, address: str) -> None:
    """One host on a switch that `plug` has set up."""
    port = f"to-{host.pid}"
    pair = ["ip", "link", "add", port, "netns", str(switch.pid), "type", "veth"]
    _checked(subprocess.run([*pair, "peer", "name", "eth0", "netns", str(host.pid)], capture_output=True, text=True))
    for words in (("link", "set", port, "master", "bridge"), ("link", "set", port, "up")):
        _checked(switch.run("ip", *words))
    for words in (
        ("addr", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        # Ray finds a machine's own address by asking for the way to one on the Internet.
        ("route", "add", "default", "dev", "eth0"),
    ):
        _checked(host.run("ip", *words))
    host.address = address


@contextmanager
def living(*hosts: Host) -> Iterator[None]:
    try:
        yield
    finally:
        for host in hosts:
            host.kill()


def wait_until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]) -> Any:
    """The first answer of `condition` that is true; an error that says `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.5)
    return answer


def _checked(done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stderr
