"""A stage whose cluster loses workers, drivers and nodes, or whose storage fails, ends as if nothing had happened.

The stage runs by its verb, in a process of its own, on a real Ray cluster of several nodes on this machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from faulty_store import faulty
from stage_workspace import SETTINGS, prepared

from jobs.stage_checkpoints import _found
from speechgpt.runtime.workspace import Workspace
from speechgpt.training import node_local

pytestmark = [pytest.mark.evidence, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(5400)]

RUN = "checkpoints/base/run"
LONGEST = 1800.0
STEPS, BLOCKS = 240, 240 * 12
FIXED = (
    *SETTINGS, f"stages.base.steps={STEPS}", "stages.base.checkpoint_every=20", "stages.base.log_every=20",
    "stages.base.micro_batch=1", "stages.base.accumulation=6", "engine.workers=2", "engine.max_failures=8",
)  # fmt: skip
STAGES = ("base", "adaptation", "crossmodal", "chain")
ELASTIC = (
    *FIXED, *(f"stages.{stage}.accumulation=3" for stage in STAGES), "engine.workers=[2,4]", "engine.resize_seconds=5"
)  # fmt: skip


class Nodes:
    """The cluster of `changing_cluster.py`."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str], address: str) -> None:
        self._process = process
        self.environment = environment | {"RAY_ADDRESS": address}

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def ask(self, *words: object) -> str:
        assert self._process.stdin
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._line()


@contextmanager
def cluster(cpus: int) -> Iterator[Nodes]:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "90"}
    # A machine that is busy is not one that is gone.
    environment |= {"RAY_health_check_timeout_ms": "20000"}
    command = [sys.executable, str(Path(__file__).with_name("changing_cluster.py")), str(cpus)]
    # Ray gives a node 30 seconds to start, which a busy machine may not have, and no more.
    for _ in range(5):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin and process.stdout
        if address := process.stdout.readline().strip():
            break
        process.wait()
    else:
        pytest.fail("the cluster did not start")
    with process:
        try:
            yield Nodes(process, environment, address)
        finally:
            process.stdin.close()


class Stage:
    """`speechgpt train base` as a process."""

    def __init__(self, workspace: Workspace, settings: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
        self.workspace, self._log = workspace, log
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "speechgpt.cli", "train", "base", "--recipe", "tiny", "--json", *words]
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*command, "--workspace", workspace.uri],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                # MLflow puts artifacts there when its database is all that it is told of.
                cwd=log.parent,
            )

    def wait_until(self, sign: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + LONGEST
        while not (found := sign()):
            assert self.process.poll() is None, f"ended too soon:\n{self.said()}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.said()}"
            time.sleep(0.05)
        return found

    def finish(self) -> dict[str, Any]:
        output, _ = self.process.communicate(timeout=LONGEST)
        assert self.process.returncode == 0, self.said()
        return json.loads(output)["figures"]

    def said(self) -> str:
        return self._log.read_text()[-6000:]

    def whole(self) -> list[tuple[int, int]]:
        """(step, workers) of the checkpoints that are whole, newest first."""
        with suppress(OSError, ValueError):
            names, _ = _found(self.workspace, RUN)
            parts = [self.workspace.read_json(f"{RUN}/{name}/part-0.json") for name in names]
            return [(part["step"], part["world"]) for part in parts]
        return []


def workers(stage: Stage) -> list[psutil.Process]:
    """Training workers of that stage's cluster, wherever Ray has hung them in the tree of processes."""
    address = stage_address(stage)
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        with suppress(psutil.Error):
            mine = address in process.environ().get("RAY_ADDRESS", "") or address in str(process.parent().cmdline())
            if process.name().startswith("ray::RayTrainW") and mine:
                found.append(process)
    return found


def writing(team: list[psutil.Process]) -> psutil.Process | None:
    """One of them that has not finished to write, or to upload, its part of a checkpoint."""
    return next((one for one in team if any(node_local.directory().glob(f"checkpoint-{one.pid}-*"))), None)


def stage_address(stage: Stage) -> str:
    return psutil.Process(stage.process.pid).environ()["RAY_ADDRESS"]


def weights(workspace: Workspace) -> bytes:
    return workspace.read_bytes("models/base/model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the stage that nothing happened to."""
    place = tmp_path_factory.mktemp("unbroken")
    with cluster(2) as nodes:
        workspace = prepared(place / "work")
        figures = Stage(workspace, FIXED, nodes.environment, place / "log").finish()
    assert (figures["step"], figures["blocks_read"]) == (STEPS, BLOCKS)
    return weights(workspace)


def test_killed_workers_drivers_and_nodes_change_no_byte(unbroken, tmp_path, record_property):
    """A worker killed while a checkpoint is written, the driver, a node: the same weights, each block once."""
    workspace = prepared(tmp_path / "work")
    with cluster(1) as nodes:
        second = nodes.ask("add", 1)
        stage = Stage(workspace, FIXED, nodes.environment, tmp_path / "log")
        stage.wait_until(lambda: stage.whole())
        team = workers(stage)
        stage.wait_until(lambda: writing(team)).kill()
        at_worker = stage.whole()[0][0]

        stage.wait_until(lambda: stage.whole()[0][0] > at_worker)
        at_driver = stage.whole()[0][0]
        stage.process.send_signal(signal.SIGKILL)
        stage.process.wait()

        stage = Stage(workspace, FIXED, nodes.environment, tmp_path / "log")
        stage.wait_until(lambda: stage.whole()[0][0] > at_driver)
        at_node = stage.whole()[0][0]
        nodes.ask("remove", second)
        nodes.ask("add", 1)
        figures = stage.finish()
    record_property("killed at steps", [at_worker, at_driver, at_node])
    assert at_node < STEPS, "the node must go while there are steps left"
    assert weights(workspace) == unbroken
    assert figures["blocks_read"] == BLOCKS


def test_a_node_that_is_drained_leaves_a_checkpoint_in_time(unbroken, tmp_path, record_property):
    """A drained node: a checkpoint before it goes, though none is due, and the same weights in the end."""
    workspace = prepared(tmp_path / "work")
    rarely = (*FIXED, "stages.base.checkpoint_every=100000")
    with cluster(1) as nodes:
        second = nodes.ask("add", 1)
        stage = Stage(workspace, rarely, nodes.environment, tmp_path / "log")
        stage.wait_until(lambda: begun(workspace))
        nodes.ask("add", 1)
        began = time.monotonic()
        nodes.ask("drain", second, 120)
        (step, _), *_ = stage.wait_until(stage.whole)
        seconds = time.monotonic() - began
        figures = stage.finish()
    record_property("checkpoint at step", step)
    record_property("seconds after the notice", round(seconds, 1))
    assert step < STEPS and seconds < 120
    assert weights(workspace) == unbroken
    assert figures["blocks_read"] == BLOCKS


def test_four_workers_then_two_then_four_train_as_four(tmp_path, record_property):
    """Elastic 4 -> 2 -> 4 workers: every loss within 1e-4 of the run whose workers stayed, the global batch held."""
    curves = {}
    with cluster(2) as nodes:
        other = nodes.ask("add", 2)
        for name in ("fixed", "elastic"):
            workspace = prepared(tmp_path / name)
            stage = Stage(workspace, ELASTIC, nodes.environment, tmp_path / f"{name}.log")
            if name == "elastic":
                stage.wait_until(lambda stage=stage: stage.whole())
                assert stage.whole()[0][1] == 4
                nodes.ask("remove", other)
                stage.wait_until(lambda stage=stage: any(world == 2 for _, world in stage.whole()))
                nodes.ask("add", 2)
                last = stage.wait_until(lambda stage=stage: [s for s in stage.whole() if s[1] == 4 and s[0] > 40])
                record_property("four again at step", last[0][0])
            figures = stage.finish()
            assert figures["blocks_read"] == BLOCKS
            curves[name] = losses(workspace)
    assert curves["fixed"].keys() == curves["elastic"].keys()
    worst = max(abs(curves["fixed"][step] - curves["elastic"][step]) for step in curves["fixed"])
    record_property("largest difference of a loss", worst)
    assert worst <= 1e-4


def losses(workspace: Workspace) -> dict[int, float]:
    """{step: loss}; of a step that was done twice, the last."""
    from mlflow import MlflowClient

    from speechgpt import recipe
    from speechgpt.runtime.tracking import Tracking

    names = [name for name in workspace.list("models/_done") if "train-base" in name and name.endswith(".json")]
    run = workspace.read_json(names[0])["run_id"]
    client = MlflowClient(Tracking.open(recipe.load("tiny").tracking, workspace, "tiny").uri)
    history = sorted(client.get_metric_history(run, "loss"), key=lambda point: point.timestamp)
    return {point.step: point.value for point in history}


def begun(workspace: Workspace) -> bool:
    """Whether some steps have been trained and logged."""
    with suppress(OSError, LookupError, ValueError):
        return bool(losses(workspace))
    return False


def test_storage_that_fails_at_times_ends_right(unbroken, s3_server, s3_bucket, tmp_path):
    """S3 that answers 500, is slow, and refuses one upload: the same weights."""
    met: dict[str, int] = {"500": 0, "refused": 0}
    count = iter(range(10**9))

    def fault(method: str, path: str) -> tuple[int, str] | float | None:
        if method not in ("PUT", "POST") or f"/{RUN}/" not in path:
            return None
        number = next(count)
        if number == 12:
            met["refused"] += 1
            return 403, "AccessDenied"
        if number % 7 == 3:
            met["500"] += 1
            return 500, "InternalError"
        return 0.2

    workspace = prepared(f"s3://{s3_bucket}/work")
    with faulty(s3_server, fault) as endpoint:
        environment = os.environ | {"AWS_ENDPOINT_URL": endpoint, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
        figures = Stage(workspace, FIXED, environment, tmp_path / "log").finish()
    assert met["500"] and met["refused"] == 1
    assert figures["blocks_read"] == BLOCKS
    assert weights(workspace) == unbroken


def test_storage_that_refuses_fails_with_the_reason(s3_server, s3_bucket, tmp_path):
    """S3 that takes no shard: the stage fails, says why, and no checkpoint looks whole."""

    def fault(method: str, path: str) -> tuple[int, str] | None:
        return (403, "AccessDenied") if method in ("PUT", "POST") and "optim_states" in path else None

    workspace = prepared(f"s3://{s3_bucket}/work")
    with faulty(s3_server, fault) as endpoint:
        environment = os.environ | {"AWS_ENDPOINT_URL": endpoint, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
        stage = Stage(workspace, (*FIXED, "engine.max_failures=0"), environment, tmp_path / "log")
        stage.process.communicate(timeout=LONGEST)
    assert stage.process.returncode == 1
    error = stage.said().rpartition("error:")[2]
    assert "stages.base failed" in error and "optim_states.pt was not taken" in error and "ACCESS_DENIED" in error
    assert stage.whole() == []
    assert not workspace.exists("models/base")
