"""The stack's real servers: up, what they hold after down and up, backup, wipe, restore; what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_stack import NEEDS_POSTGRES, free_port, own_layout

from speechgpt.runtime.stack import backup, servers, services
from speechgpt.runtime.stack.layout import Layout, StackError


@pytest.fixture
def layout() -> Iterator[Layout]:
    with own_layout() as made:
        yield made


@pytest.mark.slow
@NEEDS_POSTGRES
def test_after_a_wipe_a_backup_brings_the_champion_back(layout: Layout, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    assert [step.split()[0] for step in services.up(layout)] == ["PostgreSQL", "S3", "MLflow"]
    assert services.status(layout) == {"postgres": True, "s3": True, "mlflow": True}
    assert list(services.up(layout)), "up again finds everything running"

    client = MlflowClient(layout.tracking_uri)
    run = client.create_run(client.create_experiment("nano"))
    client.log_text(run.info.run_id, "units", "bundle/notes.txt")
    client.create_registered_model("speechgpt-nano")
    client.create_model_version("speechgpt-nano", f"{run.info.artifact_uri}/bundle", run.info.run_id)
    client.set_registered_model_alias("speechgpt-nano", "champion", "1")
    services.s3_client(layout).put_object(Bucket="speechgpt", Key="nano/units/../a b/", Body=b"x")

    saved = tmp_path / "backup"
    assert backup.backup(layout, saved) == 2
    with pytest.raises(StackError, match="not empty"):
        backup.backup(layout, saved)

    assert any("PostgreSQL" in step for step in services.down(layout))
    assert services.status(layout) == {"postgres": False, "s3": False, "mlflow": False}
    shutil.rmtree(layout.data)
    shutil.rmtree(layout.objects)
    # Database and storage are enough to restore into; MLflow comes with it.
    steps = services.up(layout)
    assert [next(steps).split()[0] for _ in range(2)] == ["PostgreSQL", "S3"]
    assert "Contents" not in services.s3_client(layout).list_objects_v2(Bucket="speechgpt")
    assert backup.restore(layout, saved) == 2
    restored = MlflowClient(layout.tracking_uri)
    assert restored.get_model_version_by_alias("speechgpt-nano", "champion").run_id == run.info.run_id
    copied = restored.download_artifacts(run.info.run_id, "bundle/notes.txt", str(tmp_path))
    assert Path(copied).read_text() == "units"
    held = services.s3_client(layout).get_object(Bucket="speechgpt", Key="nano/units/../a b/")
    assert held["Body"].read() == b"x"
    for log in layout.directory.glob("*.log"):
        assert layout.password() not in log.read_text()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is taken.*--s3-port"):
            servers.start(tmp_path, "s3", ["true"], {}, port)


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"(?s)mlflow did not start; .*mlflow\.log says:.*no such database"):
        servers.start(tmp_path, "mlflow", [sys.executable, "-c", "print('no such database')"], {}, free_port())


def test_a_number_that_is_another_process_now_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "s3.pid").write_text(json.dumps({"pid": os.getpid(), "born": 1.0}))
    assert servers.running(tmp_path, "s3") is None
    assert servers.stop(tmp_path, "s3") is False


def test_a_damaged_backup_changes_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "stack")
    with pytest.raises(StackError, match="not a whole backup"):
        backup.restore(layout, tmp_path)
    (tmp_path / "mlflow.dump").write_text("half")
    (tmp_path / "backup.json").write_text(json.dumps({"files": {"mlflow.dump": "0" * 64}}))
    with pytest.raises(StackError, match=r"mlflow\.dump is missing or was changed"):
        backup.restore(layout, tmp_path)


def test_the_password_is_its_owners_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "stack")
    layout.prepare()
    assert layout.password_file.stat().st_mode & 0o077 == 0
    before = layout.password()
    layout.prepare()
    assert layout.password() == before
    assert before not in layout.backend_uri + json.dumps(layout.environment())


def test_status_of_a_stack_that_is_down_is_exit_code_1(tmp_path: Path) -> None:
    words = ["-m", "speechgpt.runtime.stack", "status", "--json", "--directory", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["servers"] == {"postgres": False, "s3": False, "mlflow": False}
