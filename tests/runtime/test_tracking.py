"""Runs, lineage and registered models, in the embedded store and with artifacts on S3."""

import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from speechgpt.runtime import tracking as module
from speechgpt.runtime.config import TrackingSection
from speechgpt.runtime.tracking import DIGEST, Tracking, TrackingError, resolve, revision, without_password
from speechgpt.runtime.workspace import Workspace


@pytest.fixture
def tracking(run_directory: Path) -> Tracking:
    return Tracking.open(TrackingSection(), Workspace(run_directory), "tiny")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "encoder").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    (folder / "encoder" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_embedded_store_lives_in_the_workspace(tracking: Tracking, run_directory: Path) -> None:
    with tracking.run("manifest") as run:
        run.log_text("name: tiny", "recipe.yaml")
    assert tracking.uri == f"sqlite:///{run_directory}/mlflow/mlflow.db"
    assert [file.name for file in (run_directory / "mlflow/artifacts").rglob("*") if file.is_file()] == ["recipe.yaml"]
    assert Tracking.open(TrackingSection(), Workspace(run_directory), "tiny") == tracking


def test_s3_workspace_without_a_store_says_what_to_set(s3_bucket: str) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri.*MLFLOW_TRACKING_URI"):
        Tracking.open(TrackingSection(), Workspace(f"s3://{s3_bucket}/run"), "tiny")


def test_recipe_wins_over_the_environment(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("environment", "recipe"):
        shutil.copy(empty_store, tmp_path / f"{name}.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    workspace = Workspace(tmp_path / "run")
    assert Tracking.open(TrackingSection(), workspace, "tiny").uri.endswith("environment.db")
    section = TrackingSection(uri=f"sqlite:///{tmp_path}/recipe.db", experiment="mine", registered_model="voice")
    opened = Tracking.open(section, workspace, "tiny")
    assert (opened.uri.rpartition("/")[2], opened.model) == ("recipe.db", "voice")
    assert MlflowClient(opened.uri).get_experiment(opened.experiment_id).name == "mine"


def test_what_a_run_carries(tracking: Tracking) -> None:
    with tracking.run("pipeline") as parent, tracking.run("tokenize", parent, tags={"workspace": "w"}) as run:
        # Ray carries runs to its workers.
        remote = pickle.loads(pickle.dumps(run))
        remote.log_metrics({"loss": 2.0}, step=1)
        remote.log_metrics({"loss": 1.0}, step=2)
        remote.log_params({f"key{index}": index for index in range(150)} | {"long": "x" * 5000})
    client = MlflowClient(tracking.uri)
    seen = client.get_run(run.id)
    assert seen.info.status == "FINISHED"
    assert seen.data.tags["mlflow.parentRunId"] == parent.id
    assert seen.data.tags["mlflow.source.git.commit"] == revision()
    assert seen.data.tags["workspace"] == "w"
    assert [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert seen.data.params["key149"] == "149"
    assert len(seen.data.params["long"]) < 5000


def test_how_a_run_ends(tracking: Tracking) -> None:
    with pytest.raises(ValueError, match="broken"), tracking.run("failing") as failed:
        raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt), tracking.run("interrupted") as interrupted:
        raise KeyboardInterrupt
    client = MlflowClient(tracking.uri)
    assert client.get_run(failed.id).info.status == "FAILED"
    assert client.get_run(interrupted.id).info.status == "KILLED"


def test_abandon_closes_only_what_is_open(tracking: Tracking) -> None:
    client = MlflowClient(tracking.uri)
    left = client.create_run(tracking.experiment_id).info.run_id
    with tracking.run("done") as done:
        pass
    for run_id in (left, done.id, "of-another-store"):
        tracking.abandon(run_id)
    assert client.get_run(left).info.status == "KILLED"
    assert client.get_run(done.id).info.status == "FINISHED"


def test_lineage_walks_from_a_served_digest_to_the_data(tracking: Tracking, bundle: Path) -> None:
    with tracking.run("manifest") as manifest:
        manifest.made("m1", {"manifest/utterances.parquet": "m0"})
    with tracking.run("manifest") as other:
        other.made("m2", {})
    with tracking.run("tokenize", inputs={"manifest": "m1"}) as tokenize:
        tokenize.made("t1", {"units": "t0"})
    with tracking.run("train-base", inputs={"tokenize": "t1", "manifest": "m1"}) as train:
        train.made("b1", {})
    with tracking.run("publish", inputs={"train-base": "b1"}) as publish:
        tracking.register_bundle(publish, bundle, "d1")
    way = tracking.ancestry(tracking.run_of("d1"))
    assert [step.job for step in way] == ["publish", "train-base", "manifest", "tokenize"]
    assert {step.run_id for step in way} == {publish.id, train.id, tokenize.id, manifest.id}
    assert way[1].inputs == {"tokenize": "t1", "manifest": "m1"}
    assert {step.revision for step in way} == {revision()}


def test_an_unfinished_run_is_nobodys_ancestor(tracking: Tracking) -> None:
    with pytest.raises(RuntimeError), tracking.run("manifest") as broken:
        broken.made("m1", {})
        raise RuntimeError
    with tracking.run("tokenize", inputs={"manifest": "m1"}) as tokenize:
        pass
    assert [step.run_id for step in tracking.ancestry(tokenize.id)] == [tokenize.id]


def test_registering_twice_keeps_the_version_and_another_digest_gets_one(tracking: Tracking, bundle: Path) -> None:
    with tracking.run("publish") as run:
        assert tracking.register_bundle(run, bundle, "d1") == "1"
        assert tracking.register_bundle(run, bundle, "d1") == "1"
    with tracking.run("publish") as run:
        assert tracking.register_bundle(run, bundle, "d2") == "2"
    with pytest.raises(TrackingError, match="d3"):
        tracking.run_of("d3")


def test_an_alias_moves_and_resolves(tracking: Tracking, bundle: Path) -> None:
    for digest in ("d1", "d2"):
        with tracking.run("publish") as run:
            version = tracking.register_bundle(run, bundle, digest)
        tracking.promote("champion", version)
    folder = tracking.resolve("models:/speechgpt-tiny@champion")
    assert (folder / "encoder/model.safetensors").read_bytes() == b"weights"
    assert tracking.resolve("models:/speechgpt-tiny/2") == folder != tracking.resolve("models:/speechgpt-tiny/1")
    assert MlflowClient(tracking.uri).get_model_version("speechgpt-tiny", "2").tags == {DIGEST: "d2"}


def test_nothing_that_is_pickled_is_logged(tracking: Tracking, bundle: Path) -> None:
    with tracking.run("publish") as run:
        tracking.register_bundle(run, bundle, "d1")
    logged = tracking.resolve("models:/speechgpt-tiny/1")
    assert {file.name for file in logged.rglob("*") if file.is_file()} == {"bundle.json", "model.safetensors"}


def test_registered_bundle_on_s3_is_downloaded_once(
    tmp_path: Path, run_directory: Path, s3_bucket: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECHGPT_CACHE", str(tmp_path / "cache"))
    store = f"sqlite:///{run_directory}/mlflow/mlflow.db"
    MlflowClient(store).create_experiment("tiny", artifact_location=f"s3://{s3_bucket}/mlflow")
    tracking = Tracking.open(TrackingSection(uri=store), Workspace(f"s3://{s3_bucket}/run"), "tiny")
    with tracking.run("publish") as run:
        version = tracking.register_bundle(run, bundle, "d1")
    tracking.promote("champion", version)
    folder = resolve("models:/speechgpt-tiny@champion", store)
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "encoder/model.safetensors").read_bytes() == b"weights"
    (folder / "mark").touch()
    assert (resolve("models:/speechgpt-tiny@champion", store) / "mark").exists()


@pytest.mark.parametrize(
    "address", ["models:/speechgpt-tiny@nobody", "models:/speechgpt-tiny/9", "models:/other@champion"]
)
def test_what_is_not_registered_is_named(tracking: Tracking, address: str) -> None:
    with pytest.raises(TrackingError, match=address):
        tracking.resolve(address)


def test_a_registered_name_alone_needs_a_store() -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        resolve("models:/speechgpt-tiny@champion")


def test_messages_hold_no_password() -> None:
    assert without_password("postgresql://user:secret@db:5432/mlflow") == "postgresql://db:5432/mlflow"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_stage_s_model_is_registered_where_it_lies_and_only_once(tracking: Tracking) -> None:
    with tracking.run("train-chain") as run:
        first = tracking.register_stage(run, "chain", "s3://bucket/run/models/chain", "d1", {"revision": "abc"})
        assert tracking.register_stage(run, "chain", "elsewhere", "d1", {}) == first
        second = tracking.register_stage(run, "chain", "s3://bucket/run/models/chain", "d2", {})
    assert (first, second) == ("1", "2")
    version = MlflowClient(tracking.uri).get_model_version(f"{tracking.model}-chain", first)
    assert (version.source, version.run_id) == ("s3://bucket/run/models/chain", run.id)
    assert version.tags["stage"] == "chain" and version.tags["revision"] == "abc"


def test_what_the_machine_does_is_logged_while_a_block_lasts(tracking: Tracking) -> None:
    with tracking.run("train") as run, run.system_metrics():
        deadline = time.monotonic() + 120
        while not _system_metrics(tracking, run.id) and time.monotonic() < deadline:
            time.sleep(0.5)
    assert "system/cpu_utilization_percentage" in _system_metrics(tracking, run.id)


def _system_metrics(tracking: Tracking, run_id: str) -> list[str]:
    return [name for name in MlflowClient(tracking.uri).get_run(run_id).data.metrics if name.startswith("system/")]


def test_artifacts_pass_through_the_server_unless_somebody_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of a server in front of S3 would be sent to S3 by a name that only the server knows."""
    from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD as DOWNLOAD
    from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD as UPLOAD

    for variable in (DOWNLOAD, UPLOAD):
        monkeypatch.setenv(variable.name, "")
        monkeypatch.delenv(variable.name)
    module._client.cache_clear()
    module._client(f"sqlite:///{tmp_path}/store.db")
    # MLflow asks the server only where nothing is set.
    assert [(variable.is_set(), variable.get()) for variable in (DOWNLOAD, UPLOAD)] == [(True, False)] * 2
    monkeypatch.setenv(DOWNLOAD.name, "true")
    module._client.cache_clear()
    module._client(f"sqlite:///{tmp_path}/store.db")
    assert DOWNLOAD.get() is True
