"""A backup of MLflow and its storage brings back the service that the registry named."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import bundle_variants
import httpx
import pytest
from hosts import wait_until
from own_stack import NEEDS_POSTGRES, free_port, own_layout

from speechgpt.runtime import bundle
from speechgpt.runtime.stack import backup, services
from speechgpt.runtime.stack.layout import Layout
from speechgpt.runtime.tracking import DIGEST

MODEL = "speechgpt-nano"
QUESTION = [{"role": "user", "content": "what is two plus three"}]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800), NEEDS_POSTGRES]


@pytest.fixture
def layout() -> Iterator[Layout]:
    with own_layout() as made:
        yield made


def registered(layout: Layout, directory: Path) -> str:
    """The version that a bundle gets, its files in the stack's storage."""
    from mlflow import MlflowClient

    client = MlflowClient(layout.tracking_uri)
    experiment = client.get_experiment_by_name("nano")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("nano"))
    client.log_artifacts(run.info.run_id, str(directory), "bundle")
    tags = {DIGEST: bundle.load(directory).digest}
    made = client.create_model_version(MODEL, f"{run.info.artifact_uri}/bundle", run.info.run_id, tags=tags)
    return str(made.version)


@contextmanager
def service(layout: Layout, folder: Path) -> Iterator[str]:
    """Address of `speechgpt serve models:/…@champion`, with nothing kept from an earlier download."""
    port, log = free_port(), folder / "serve.log"
    folder.mkdir()
    environment = os.environ | layout.environment() | {"SPEECHGPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "speechgpt.cli", "serve", f"models:/{MODEL}@champion", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: process.poll() is not None or ready(url), 600, lambda: log.read_text()[-4000:])
        assert process.poll() is None, log.read_text()[-4000:]
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def answer(url: str) -> tuple[str, str]:
    """(digest of the bundle, reply)"""
    asked = {"model": "speechgpt", "messages": QUESTION, "modalities": ["text"]}
    asked["model"] = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.headers["x-speechgpt-bundle"], reply.json()["choices"][0]["message"]["content"]


def test_after_a_wipe_and_a_restore_the_service_has_the_same_champion(
    layout: Layout, tmp_path: Path, record_property: Any
) -> None:
    """MLflow's database and storage are wiped and restored: the service comes up with the champion it had before."""
    from mlflow import MlflowClient

    list(services.up(layout))
    client = MlflowClient(layout.tracking_uri)
    client.create_registered_model(MODEL)
    nano = Path(str(resources.files("speechgpt") / "bundles" / "nano"))
    other = bundle_variants.remade(nano, tmp_path / "other", bundle_variants.voice(1))
    versions = [registered(layout, directory) for directory in (nano, other)]
    # Not the newest, so that only the alias says which.
    client.set_registered_model_alias(MODEL, "champion", versions[0])
    with service(layout, tmp_path / "before") as url:
        before = answer(url)
    assert before[0] == bundle.load(nano).digest

    record_property("objects in the backup", backup.backup(layout, tmp_path / "backup"))
    list(services.down(layout))
    shutil.rmtree(layout.data)
    shutil.rmtree(layout.objects)
    list(services.up(layout))
    assert client.search_registered_models() == [], "wiped"
    # The empty server has made tables of its own; a restore is into a stack that is up.
    backup.restore(layout, tmp_path / "backup")
    with service(layout, tmp_path / "after") as url:
        assert answer(url) == before
    record_property("bundle served before and after", before[0][:12])
    record_property("reply", before[1])
