"""Say what this machine has and lacks for SpeechGPT, and how to get what is missing.

Exit code 1 if something that is required is missing.
"""

import json as json_module
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from speechgpt.runtime.bucket_health import examine_bucket
from speechgpt.runtime.cluster_health import answers_strangers, examine_cluster
from speechgpt.runtime.findings import Finding
from speechgpt.runtime.tracking import without_password

DISTRIBUTION = "speechgpt-ray"
SERVE_PORT = 8000
DASHBOARD_PORT = 8265
MIN_FREE_DISK = 5 << 30
MIN_MEMORY = 6 << 30
MIN_SHARED_MEMORY = 1 << 30
MIN_OPEN_FILES = 4096

_OPTIONAL_EXTRAS = {
    "voices": "recipes that synthesise their speech, and the teacher of train-encoder",
    "judge": "the judged metrics of evaluate",
    "kokoro": "recipes with many good voices (nano-full, small)",
    "mos": "a second opinion on the quality of speech",
}


def main(
    workspace: Annotated[
        str, typer.Option(help="Where runs are to be kept; its disk or bucket is looked at.")
    ] = "runs",
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="A cluster's dashboard to examine, too, e.g. http://head:8265."
        ),
    ] = "",
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
) -> None:
    """Say what this machine, and a cluster, has and lacks for SpeechGPT, and how to get it."""
    findings = list(examine(workspace, address))
    healthy = all(finding.grade != "missing" for finding in findings)
    if json:
        print(json_module.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _show(findings)
    raise typer.Exit(0 if healthy else 1)


def examine(workspace: str, address: str = "") -> Iterator[Finding]:
    """Look at everything, in the order in which things go wrong."""
    yield _python()
    yield from _packages()
    yield from _extras()
    yield _compiler()
    yield _cpus()
    # What is absent has been named by now.
    if find_spec("psutil"):
        yield _memory()
    if find_spec("torch"):
        yield _gpu()
    yield _open_files()
    if shared_memory := _shared_memory():
        yield shared_memory
    if workspace.startswith("s3://"):
        yield from examine_bucket(workspace)
    else:
        yield _storage(workspace)
    yield _ray()
    if address:
        yield from examine_cluster(address)
    elif exposed := _exposed_dashboard():
        yield exposed
    yield _tracking()
    yield _port("serving port", SERVE_PORT, "speechgpt serve --port N")


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Finding("python", "ok", version)
    return Finding("python", "missing", version, "python 3.11: DeepSpeed's and fairseq's wheels meet on it")


def _packages() -> Iterator[Finding]:
    """The installed versions against the distribution's own requirements."""
    from packaging.requirements import Requirement

    wrong = 0
    required = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    for requirement in required:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            yield Finding(requirement.name, "missing", version or "absent", f'pip install "{requirement}"')
    if not wrong:
        core = ", ".join(f"{name} {_version(name)}" for name in ("torch", "ray", "deepspeed", "transformers", "mlflow"))
        yield Finding("packages", "ok", f"all {len(required)} as required; {core}")
    for name in ("torchaudio", "torchvision", "torchcodec"):
        if find_spec(name) and _is_cpu_build("torch") and not _is_cpu_build(name):
            remedy = f"pip uninstall {name}: not needed here, and a CUDA build of it breaks a CPU build of torch"
            yield Finding(name, "missing", f"{_version(name)}, beside torch {_version('torch')}", remedy)


def _extras() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    lines = metadata.requires(DISTRIBUTION) or []
    for extra, purpose in _OPTIONAL_EXTRAS.items():
        names = [Requirement(line).name for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
        absent = [name for name in names if _version(name) is None]
        if absent:
            remedy = f'pip install "{DISTRIBUTION}[{extra}]", for {purpose}'
            yield Finding(f"extra {extra}", "note", f"absent: {', '.join(absent)}", remedy)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(names))


def _compiler() -> Finding:
    if path := shutil.which("g++") or shutil.which("c++"):
        return Finding("C++ compiler", "ok", path)
    return Finding(
        "C++ compiler", "note", "none", "apt-get install g++: DeepSpeed compiles its parts at the first training"
    )


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0))
    if usable >= 2:
        return Finding("CPU cores", "ok", str(usable))
    return Finding("CPU cores", "note", str(usable), "two or more; everything waits for everything on one")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB free"
    if free >= MIN_MEMORY:
        return Finding("memory", "ok", found)
    return Finding("memory", "note", found, f"{MIN_MEMORY >> 30} GiB free, or a smaller recipe (--recipe tiny)")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(names))
    if shutil.which("nvidia-smi"):
        found = f"a driver, but torch {torch.__version__} cannot use it"
        return Finding("GPU", "note", found, "a CUDA build of torch that fits the driver")
    return Finding("GPU", "note", "none", "not needed for nano and tiny")


def _storage(workspace: str) -> Finding:
    place = Path(workspace).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("workspace", "missing", f"{place} cannot be written", "--workspace DIRECTORY of your own")
    if free < MIN_FREE_DISK:
        return Finding("workspace", "missing", found, f"{MIN_FREE_DISK >> 30} GiB, or --workspace on another disk")
    return Finding("workspace", "ok", found)


def _open_files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= MIN_OPEN_FILES or soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", str(soft))
    return Finding("open files", "note", str(soft), f"ulimit -n {MIN_OPEN_FILES}: Ray's processes hold many sockets")


def _shared_memory() -> Finding | None:
    """Ray's object store lies in /dev/shm; a container's own has 64 MB, and Ray then uses the slow /tmp."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    size = shutil.disk_usage(place).total
    if size >= MIN_SHARED_MEMORY:
        return Finding("shared memory", "ok", f"{size / 2**30:.1f} GiB at /dev/shm")
    found = f"{size / 2**20:.0f} MiB at /dev/shm"
    return Finding(
        "shared memory", "note", found, "docker run --shm-size=4g (Kubernetes: an emptyDir of medium Memory)"
    )


def _exposed_dashboard() -> Finding | None:
    """A Ray dashboard of this machine that other machines reach, and that asks nobody for a token."""
    if not find_spec("psutil") or not find_spec("httpx"):
        return None
    import psutil

    try:
        listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return None
    public = [a for a in listening if a.port == DASHBOARD_PORT and not a.ip.startswith("127.") and a.ip != "::1"]
    if not public or not answers_strangers(f"http://127.0.0.1:{DASHBOARD_PORT}"):
        return None
    remedy = "stop it, and start it with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1"
    found = f"the dashboard on {public[0].ip}:{DASHBOARD_PORT} runs any code for anybody"
    return Finding("Ray authentication", "missing", found, remedy)


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return Finding("Ray cluster", "ok", "a private local one, started when needed (RAY_ADDRESS is not set)")
    host, port = _host_and_port(address, DASHBOARD_PORT)
    if _listens(host, port):
        return Finding("Ray cluster", "ok", f"{address} answers")
    return Finding(
        "Ray cluster", "missing", f"{address} does not answer", "start it, or unset RAY_ADDRESS for a private one"
    )


def _tracking() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return Finding("tracking", "ok", "embedded, in the workspace (MLFLOW_TRACKING_URI is not set)")
    if not uri.startswith("http"):
        return Finding("tracking", "ok", without_password(uri))
    host, port = _host_and_port(uri, 443 if uri.startswith("https") else 80)
    if _listens(host, port):
        return Finding("tracking", "ok", f"{without_password(uri)} answers")
    return Finding(
        "tracking", "missing", f"{without_password(uri)} does not answer", "start it, or unset MLFLOW_TRACKING_URI"
    )


def _port(subject: str, port: int, remedy: str) -> Finding:
    if _listens("127.0.0.1", port):
        return Finding(subject, "note", f"{port} is taken", remedy)
    return Finding(subject, "ok", f"{port} is free")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_cpu_build(name: str) -> bool:
    return "+cpu" in (_version(name) or "")


def _host_and_port(address: str, default: int) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    return parts.hostname or "127.0.0.1", parts.port or default


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    table = Table("", "what", "found", "to do", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.grade], finding.subject, finding.found, finding.remedy)
    Console().print(table)
