"""What tests share: the order they run in, one Ray cluster and one S3 server for the whole session."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from told_service import ToldService, told_services

# The same examples in every run, so that a run tells something about the change and not about the dice;
# `HYPOTHESIS_PROFILE=default` throws them.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


S3_ENDPOINT = f"http://127.0.0.1:{_free_port()}"


def pytest_configure() -> None:
    """An environment of the tests' own, which Ray's workers inherit: nobody's cluster, account or store is touched."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(
        AWS_ENDPOINT_URL=S3_ENDPOINT,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        MLFLOW_S3_ENDPOINT_URL=S3_ENDPOINT,
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        DS_ACCELERATOR="cpu",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then those that use Ray, then the slow ones, then those that share one service."""
    items.sort(
        key=lambda item: (
            "service_url" in getattr(item, "fixturenames", ()),
            item.get_closest_marker("slow") is not None,
            item.get_closest_marker("ray") is not None,
        )
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private local Ray for all tests marked `ray`."""
    import ray

    for attempt in range(5):
        try:
            ray.init(address="local", num_cpus=4, object_store_memory=250 << 20, include_dashboard=True)
            break
        except Exception as error:
            # Ray gives a node 30 seconds to start, which a busy machine may not have, and no more.
            ray.shutdown()
            if attempt == 4 or "timed out during startup" not in str(error):
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run; making one takes its 60 migrations, copying it takes nothing."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run_directory(tmp_path: Path, empty_store: Path) -> Path:
    """An empty directory for a workspace, with its embedded tracking store made."""
    (tmp_path / "run" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "run" / "mlflow" / "mlflow.db")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server process; the environment points every client at it already. Gives its endpoint."""
    port = S3_ENDPOINT.rpartition(":")[2]
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", port]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for_answer(server, log)
        yield S3_ENDPOINT
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def s3_bucket(s3_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty bucket for one test; gives its name."""
    import boto3

    name = f"test-{abs(hash(request.node.nodeid)):x}"
    bucket = boto3.resource("s3").create_bucket(Bucket=name)
    yield name
    bucket.objects.all().delete()
    bucket.delete()


def _wait_for_answer(server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{S3_ENDPOINT}/moto-api/", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the S3 server did not start:\n{log.read_text()}")


@pytest.fixture
def serve() -> Iterator[Callable[..., ToldService]]:
    """Starts HTTP services that answer as they are told."""
    with told_services() as start:
        yield start
