"""Kill -9 in the middle of every job; started again, the pipeline ends in what an unbroken one makes.

The driver and the whole of its Ray die at once, as a machine does. What is compared is the content of every output, and
for the two that name their MLflow runs (the bundle's lineage, the report's curves) the digest of what they hold.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs.shell import PARTS
from speechgpt.runtime.workspace import Workspace

pytestmark = [pytest.mark.evidence, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

_LONGEST_JOB = 600.0
_LATEST_KILL = 6.0
"""Seconds into a job; a tiny job that ends sooner is killed in whatever comes next."""


def jobs_finished(place: Workspace) -> dict[str, dict]:
    """{job: its marker}."""
    names = [name for part in PARTS for name in place.list(f"{part}/_done")]
    markers = [place.read_json(name) for name in names if name.endswith(".json") and not name.endswith(".started.json")]
    return {marker["job"]: marker for marker in markers}


def job_running(place: Workspace) -> str | None:
    for part in PARTS:
        for name in place.list(f"{part}/_done"):
            if name.endswith(".started.json"):
                return name.rpartition("/")[2].removesuffix(".started.json")
    return None


def start(place: Workspace, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "speechgpt.cli", "pipeline", "--recipe", "tiny", "--workspace", place.uri]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The driver, its Ray and every worker, none of which gets to say goodbye."""
    family = [psutil.Process(process.pid)]
    with suppress(psutil.Error):
        family += family[0].children(recursive=True)
    for member in family:
        with suppress(psutil.Error):
            member.send_signal(signal.SIGKILL)
    process.wait()


def kill_in_every_job(place: Workspace, log: Path) -> Iterator[str]:
    """Start again and again, each time killing the first job that was not killed yet; yields the names of those."""
    delays, killed = random.Random(1), set[str]()
    while True:
        process = start(place, log)
        deadline = time.monotonic() + _LONGEST_JOB
        while (job := job_running(place)) is None or job in killed:
            if process.poll() is not None:
                assert process.returncode == 0, log.read_text()[-4000:]
                return
            assert time.monotonic() < deadline, f"{job} did not end: {log.read_text()[-4000:]}"
            time.sleep(0.02)
        killed.add(job)
        # Into Ray's start, into the work, or (short jobs) after it: a kill may come at any time.
        time.sleep(delays.uniform(0, _LATEST_KILL))
        kill_all(process)
        yield job


def content(place: Workspace) -> dict[str, str]:
    """{job: digest of what it made}, without what names the runs that made it."""
    made = {}
    for job, marker in jobs_finished(place).items():
        outputs = {name: digest for name, digest in marker["outputs"].items() if not name.endswith(".html")}
        made[job] = marker["figures"]["bundle_digest"] if job in ("publish", "promote") else str(outputs)
    return made


def test_killed_in_every_job_and_started_again_it_ends_the_same(tmp_path: Path) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    unbroken, broken = Workspace(tmp_path / "unbroken"), Workspace(tmp_path / "broken")
    log = tmp_path / "log"
    process = start(unbroken, log)
    assert process.wait(timeout=3 * _LONGEST_JOB) == 0, log.read_text()[-4000:]
    killed = list(kill_in_every_job(broken, log))
    expected = content(unbroken)
    assert set(killed) >= set(expected) - {"manifest", "publish", "promote"}, "each long job was killed once"
    assert content(broken) == expected
    assert job_running(broken) is None
