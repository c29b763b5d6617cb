"""A corpus into units while the driver is killed twice and a node vanishes, in a directory and on an S3 that fails."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import flaky_store
import pyarrow as pa
import pytest
import sound_files
import three_nodes
import tokenize_driver
from tiny_models import add_encoder

from jobs.shards import plan
from speechgpt.recipe import load
from speechgpt.runtime import buckets
from speechgpt.runtime.recordings import UTTERANCE_SCHEMA
from speechgpt.runtime.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

FILES = int(os.environ.get("EVIDENCE_FILES", "5000"))
MANIFEST = os.environ.get("EVIDENCE_MANIFEST", "")
SETTINGS = (
    "data.max_bad_fraction=1",
    "corpora.shard_seconds=20",
    "resources.tokenisation={min_actors: 1, max_actors: 3, cpus: 1}",
)
OPEN = {"RAY_AUTH_MODE": "disabled"}
"""The cluster is on loopback, and its drivers come and go."""


@contextmanager
def cluster(log: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a cluster that vanishes at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, three_nodes.__file__],
            env=os.environ | OPEN,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdin and process.stdout
    try:
        address = process.stdout.readline().strip()
        assert address, log.read_text()[-4000:]
        yield address, process
    finally:
        process.stdin.close()
        process.wait(120)


def order(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    assert process.stdout.readline().strip() == "done"


def start(place: Workspace, address: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, tokenize_driver.__file__, place.uri, *SETTINGS]
    with log.open("ab") as output:
        environment = os.environ | OPEN | {"RAY_ADDRESS": address}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_for(place: Workspace, shards: float, driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 1800
    while len(place.list("units")) < shards:
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def corpus(place: Workspace, folder: Path) -> dict[str, str]:
    """FILES sounds in ten formats, 2 % of them bad, an encoder and a manifest; {path: reason} of the bad ones."""
    folder.mkdir(parents=True)
    kinds = list(sound_files.POISON)
    bad = {number: kinds[number // 50 % len(kinds)] for number in range(0, FILES, 50)}
    rows, reasons = [], {}
    for number in range(FILES):
        name = f"{number:05d}"
        if number in bad:
            reason, make = sound_files.POISON[bad[number]]
            file = folder / f"{name}-{bad[number]}"
            if (data := make(folder)) is not None:
                file.write_bytes(data)
        else:
            reason = ""
            wave = sound_files.speech(0.1 + number % 37 / 100, number)
            file = sound_files.write(folder, name, wave, sound_files.FORMATS[number % 10])
        path = place.path(f"sounds/{file.name}")
        reasons |= {path: reason} if reason else {}
        rows.append({"id": name, "path": path, "split": "train", "seconds": 0.1 + number % 37 / 100})
    files = [file for file in folder.iterdir() if file.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: place.write_bytes(f"sounds/{file.name}", file.read_bytes()), files))
    place.write_table("manifest/utterances.parquet", pa.Table.from_pylist(rows, UTTERANCE_SCHEMA), group_rows=512)
    add_encoder(place)
    return reasons


def content(place: Workspace) -> dict[str, str]:
    return {part: place.digest(part) for part in ("units", "quarantine") if place.list(part)}


def check(place: Workspace, folder: Path, reasons: dict[str, str], record_property) -> None:
    """reasons: {path: why} of the recordings that are to be refused."""
    files = place.count_rows("manifest/utterances.parquet")
    shards = len(plan(place, load("tiny", SETTINGS)))
    log = folder / "log"
    with cluster(folder / "cluster.log") as (address, nodes):
        began = time.monotonic()
        driver = start(place, address, log)
        assert driver.wait(3000) == 0, log.read_text()[-4000:]
        unbroken_seconds = time.monotonic() - began
        unbroken = content(place)
        refused = place.read_table("quarantine").to_pylist() if "quarantine" in unbroken else []
        assert {row["source"]: row["reason"] for row in refused} == reasons
        assert place.read_table("units").num_rows == files - len(reasons)
        for part in unbroken:
            place.delete(part)
        began = time.monotonic()
        for losing, share in ((False, 0.2), (True, 0.6)):
            driver = start(place, address, log)
            if losing:
                wait_for(place, 0.4 * shards, driver, log)
                order(nodes, "lose")
            wait_for(place, share * shards, driver, log)
            driver.kill()
            driver.wait()
        assert len(place.list("units")) < shards, "killed in the middle"
        driver = start(place, address, log)
        assert driver.wait(3000) == 0, log.read_text()[-4000:]
        assert content(place) == unbroken
        record_property("files", files)
        record_property("shards", shards)
        record_property("in quarantine", len(reasons))
        record_property("unbroken, seconds", round(unbroken_seconds, 1))
        record_property("broken, seconds", round(time.monotonic() - began, 1))


def test_in_a_directory(tmp_path, record_property):
    """A corpus in ten formats, its driver killed twice and a node of three taken away, ends as an unbroken run."""
    place = Workspace(tmp_path / "work")
    check(place, tmp_path, corpus(place, tmp_path / "sounds"), record_property)


@pytest.mark.skipif(not MANIFEST, reason="EVIDENCE_MANIFEST names no manifest of recordings")
def test_of_recordings(tmp_path, record_property):
    """The same with real recordings, those of the manifest that EVIDENCE_MANIFEST names."""
    place = Workspace(tmp_path / "work")
    chosen = ["--set", f"data.extra_manifests=[{MANIFEST}]", "--set", "data.shipped_recordings=false"]
    job = [sys.executable, "-m", "speechgpt.cli", "manifest", "--recipe", "tiny", "--workspace", place.uri, *chosen]
    subprocess.run(job, check=True)
    add_encoder(place)
    check(place, tmp_path, {}, record_property)


def test_on_s3(tmp_path, s3_bucket, s3_server, record_property, monkeypatch):
    """The same on s3:// with 1 % of the requests failing."""
    with flaky_store.flaky(s3_server, share=0.01) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        buckets.filesystem.cache_clear()
        buckets._client.cache_clear()
        try:
            place = Workspace(f"s3://{s3_bucket}/work")
            check(place, tmp_path, corpus(place, tmp_path / "sounds"), record_property)
        finally:
            buckets.filesystem.cache_clear()
            buckets._client.cache_clear()
        record_property("requests", store.asked)
        record_property("requests that failed", store.failed)
        assert store.failed > 0
