"""`tokenize` and `fit-units` as corpora and clusters grow: memory stays, and nodes that share no processor add up."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import sound_files
from tiny_models import add_encoder

from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(5400)]

MATERIAL = Path(__file__).parents[1] / "material"
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}
"""The cluster is on loopback, and its drivers come and go."""
SECONDS = 0.4
"""Of a clip."""
FILES = (400, 4000)
SHARDS, SLEEP, NODES = 200, 2.0, 4
FRAMES = int(os.environ.get("EVIDENCE_FRAMES", "100_000_000"))
FRAME_BYTES = 64 * 4
"""Of the recipe `tiny`."""


@contextmanager
def cluster(log: Path, cpus: int = 1) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Address of a cluster of one node with so many processors, and what takes the orders of `changing_cluster.py`."""
    command = [sys.executable, str(Path(__file__).with_name("changing_cluster.py")), str(cpus)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
        )
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def order(line: str) -> str:
        print(line, file=stdin, flush=True)
        return stdout.readline().strip()

    try:
        address = stdout.readline().strip()
        assert address, log.read_text()[-4000:]
        yield address, order
    finally:
        stdin.close()
        process.wait(120)


def corpus(place: Workspace, files: int, folder: Path) -> None:
    """So many clips of equal length, few of whose sounds differ, and an encoder."""
    folder.mkdir(exist_ok=True)
    sounds = [sound_files.write(folder, f"{n}", sound_files.speech(SECONDS, n), "flac") for n in range(8)]
    rows = [{"id": f"{n:06d}", "path": str(sounds[n % 8]), "split": "train", "seconds": SECONDS} for n in range(files)]
    place.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA), group_rows=512)
    add_encoder(place)


def started(driver: str, address: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        environment = ENVIRONMENT | {"RAY_ADDRESS": address}
        return subprocess.Popen(
            [sys.executable, str(MATERIAL / driver), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def own_memory(process: psutil.Process) -> int:
    """Bytes that no other process shares: the object store is Ray's, and its size is fixed."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def peaks(driver: subprocess.Popen[bytes], actor: str) -> dict[str, int]:
    """The most memory that the driver, and any one worker of the job (an `actor`), ever had, in bytes."""
    found = {"driver": 0, "worker": 0}
    while driver.poll() is None:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                title = " ".join(process.cmdline())
                if process.pid == driver.pid:
                    found["driver"] = max(found["driver"], own_memory(process))
                elif title.startswith("ray::") and actor in title and process.username() == _me():
                    found["worker"] = max(found["worker"], own_memory(process))
        time.sleep(0.5)
    return found


def _me() -> str:
    return psutil.Process().username()


def test_memory_is_flat_in_the_number_of_files(tmp_path, record_property):
    """Ten times the files take the same memory: the peak of the driver and of its worker within 10 %."""
    measured = []
    for files in FILES:
        place, log = Workspace(tmp_path / f"{files}"), tmp_path / "log"
        corpus(place, files, tmp_path / "sounds")
        with cluster(tmp_path / "cluster.log") as (address, _):
            settings = ("corpora.shard_seconds=20", "resources.tokenisation={min_actors: 1, max_actors: 1, cpus: 1}")
            driver = started("tokenize_driver.py", address, log, place.uri, *settings)
            measured.append(peaks(driver, "Tokenizer"))
        assert driver.returncode == 0, log.read_text()[-4000:]
        assert place.read_table("units").num_rows == files
        for who, most in measured[-1].items():
            record_property(f"{files} files, {who}, MB", round(most / 1e6, 1))
    few, many = measured
    for who in few:
        assert 0 < many[who] <= 1.1 * few[who], (few, many)


def test_a_codebook_takes_the_memory_of_a_batch(tmp_path, record_property):
    """k-means of a hundred million frames takes the memory of ten million: driver and workers within 10 %."""
    if shutil.disk_usage(tmp_path).free < 1.2 * FRAMES * FRAME_BYTES:
        pytest.skip(f"needs {1.2 * FRAMES * FRAME_BYTES / 1e9:.0f} GB of disk")
    measured = []
    for frames in (FRAMES // 10, FRAMES):
        place, log = Workspace(tmp_path / f"{frames}"), tmp_path / f"{frames}.log"
        corpus(place, 1, tmp_path / "sounds")
        rows = [{"id": f"{n:06d}", "path": "", "split": "train", "seconds": 60.0} for n in range(-(-frames // 3000))]
        place.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA), group_rows=512)
        settings = (
            f"codebook={{clusters: 100, frames: {frames}, iterations: 4}}",
            "resources.tokenisation={max_actors: 2, cpus: 1}",
        )
        began = time.monotonic()
        with cluster(tmp_path / "cluster.log", cpus=2) as (address, _):
            driver = started("frames_driver.py", address, log, place.uri, *settings)
            measured.append(peaks(driver, "Featurizer"))
        assert driver.returncode == 0, log.read_text()[-4000:]
        found = json.loads(log.read_text().strip().splitlines()[-1])
        assert found["frames"] == frames and found["iterations"] == 4
        record_property(f"{frames} frames, seconds", round(time.monotonic() - began))
        record_property(f"{frames} frames, inertia a frame", round(found["inertia"], 4))
        record_property(f"{frames} frames, dead units", found["dead_units"])
        for who, most in measured[-1].items():
            record_property(f"{frames} frames, {who}, MB", round(most / 1e6, 1))
    few, many = measured
    for who in few:
        assert 0 < many[who] <= 1.1 * few[who], (few, many)


def test_nodes_that_sleep_add_up(tmp_path, record_property):
    """With workers that sleep where they would compute, four nodes of one processor finish at least 3.6 times as many
    shards a second as one. Measured over the middle half of the shards, when all workers are there."""
    paces, walls = {}, {}
    with cluster(tmp_path / "cluster.log") as (address, order):
        for nodes in (1, NODES):
            for _ in range(nodes - 1):
                order("add 1")
            place, log = Workspace(tmp_path / f"{nodes}"), tmp_path / "log"
            corpus(place, SHARDS, tmp_path / "sounds")
            settings = (
                f"corpora.shard_seconds={SECONDS}",
                f"resources.tokenisation={{min_actors: {nodes}, max_actors: {nodes}, cpus: 1}}",
            )
            began = time.monotonic()
            driver = started("sleeping_driver.py", address, log, place.uri, str(SLEEP), *settings)
            assert driver.wait(3000) == 0, log.read_text()[-4000:]
            walls[nodes] = time.monotonic() - began
            ends = sorted(Path(place.path(name)).stat().st_mtime for name in place.list("units"))
            assert len(ends) == SHARDS
            first, last = SHARDS // 4, 3 * SHARDS // 4
            paces[nodes] = (last - first) / (ends[last] - ends[first])
            record_property(f"shards a second, {nodes} nodes", round(paces[nodes], 3))
            record_property(f"whole job, {nodes} nodes, seconds", round(walls[nodes], 1))
    record_property("times as fast", round(paces[NODES] / paces[1], 2))
    record_property("times as fast, whole job with the start of its workers", round(walls[1] / walls[NODES], 2))
    record_property("share of a shard's time that is not sleep, 1 node", round(1 - SLEEP * paces[1], 4))
    assert paces[NODES] / paces[1] >= 3.6
