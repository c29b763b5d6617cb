"""The job `train` on a private Ray: what it makes, and that a killed worker changes nothing in it."""

import os
import signal
import sys
import threading
import time
from importlib import resources
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save

sys.path.insert(0, str(Path(__file__).parent))
import stage_workspace
from stage_workspace import prepared

from jobs import shell, train_language
from jobs.training_storage import forget_broken_run
from speechgpt import recipe as recipes
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.runtime.workspace import Workspace
from speechgpt.training.unit_noise import UnitNoise

SETTINGS = (*stage_workspace.SETTINGS, "stages.base.validate_every=100", "stages.base.answers=2")


def train(workspace: Workspace, stage: str, *settings: str) -> dict:
    recipe = recipes.load("tiny", (*SETTINGS, *settings))
    return shell.execute(train_language.JOB, recipe, workspace, stage, json=True)


def test_what_is_heard_comes_with_noise_anew_in_each_block(monkeypatch):
    monkeypatch.setattr("ray.get", lambda tokens: tokens)
    centroids = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    units = (np.random.default_rng(1).permutation(50) + 100).astype(np.int32)
    weights = np.r_[np.zeros(30), np.ones(20)].astype(np.float32)
    tokens = pa.table(
        {"ids": pa.array([units], pa.list_(pa.int32())), "weights": pa.array([weights], pa.list_(pa.float32()))}
    )
    plan = pa.table({"index": pa.array([0, 1], pa.int64()), "rows": [[0], [0]]})

    def packed(noise: UnitNoise | None) -> list[list[int]]:
        return train_language._pack(plan, tokens, 50, 0, noise, seed=1)["ids"].to_pylist()

    assert packed(None) == [units.tolist()] * 2
    first, second = packed(UnitNoise(centroids, 100, 0.3))
    assert first[30:] == second[30:] == units[30:].tolist()
    assert first[:30] != second[:30] and units[:30].tolist() not in (first[:30], second[:30])
    assert packed(UnitNoise(centroids, 100, 0.3)) == [first, second]


@pytest.fixture(scope="module")
def unbroken(ray_cluster, tmp_path_factory) -> tuple[Workspace, dict]:
    workspace = prepared(tmp_path_factory.mktemp("unbroken"))
    return workspace, train(workspace, "base")


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_leaves_a_model_figures_and_a_curve(unbroken):
    from mlflow import MlflowClient
    from transformers import AutoModelForCausalLM

    from speechgpt.language.vocabulary import Vocabulary

    workspace, done = unbroken
    model = AutoModelForCausalLM.from_pretrained(workspace.path("models/base"))
    assert Vocabulary.load(workspace.path("models/base")).unit_count == 32
    assert done["figures"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (done["figures"]["step"], done["figures"]["blocks_read"]) == (300, 1200)
    # 60 rows of each kind. Of text one is held out and one is longer than a block; of recognition three are held out.
    assert (done["figures"]["rows"], done["figures"]["rows_left_out"]) == (115, 1)
    curve = MlflowClient(_tracking(workspace)).get_metric_history(done["run_id"], "loss_text")
    assert [point.step for point in curve][:6] == [50, 100, 150, 200, 250, 300]
    assert curve[-1].value < curve[0].value


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_is_watched_and_its_model_registered(unbroken):
    from mlflow import MlflowClient

    workspace, done = unbroken
    client, figures = MlflowClient(_tracking(workspace)), done["figures"]
    assert figures["validation_loss_after"] < figures["validation_loss_before"]
    assert figures["retained_text_validation_loss_after"] < figures["retained_text_validation_loss_before"]
    looked = {point.step for point in client.get_metric_history(done["run_id"], "validation_loss")}
    assert looked == {0, 100, 200, 300}
    logged = client.get_run(done["run_id"]).data
    assert {"mfu", "tokens_per_second", "perplexity_text", "tokens_seen", "memory_peak_gib"} <= set(logged.metrics)
    assert any(name.startswith("system/") for name in logged.metrics)
    assert logged.tags["mlflow.source.git.commit"]
    pages = [file.path for file in client.list_artifacts(done["run_id"], "samples/step-0000300")]
    assert "samples/step-0000300/index.html" in pages
    assert "recipe.yaml" in [file.path for file in client.list_artifacts(done["run_id"])]
    [version] = client.search_model_versions("name = 'speechgpt-tiny-base'")
    assert version.run_id == done["run_id"] and int(version.version) == figures["model_version"]
    assert Path(version.source) == Path(workspace.path("models/base"))
    assert version.tags["revision"] and version.tags["recipe"] == "tiny"


@pytest.mark.ray
@pytest.mark.slow
def test_a_lora_stage_leaves_an_adapter_for_the_stage_before(unbroken):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    workspace, _ = unbroken
    done = train(workspace, "chain")
    assert done["figures"]["trainable_parameters"] < done["figures"]["parameters"] / 10
    base = AutoModelForCausalLM.from_pretrained(workspace.path("models/base"))
    adapted = PeftModel.from_pretrained(base, workspace.path("models/chain"))
    assert adapted.peft_config["default"].base_model_name_or_path
    assert str(workspace.uri) not in Path(workspace.path("models/chain/adapter_config.json")).read_text()
    assert any(parameter.abs().sum() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_changes_nothing_in_the_result(unbroken, tmp_path):
    whole, _ = unbroken
    workspace = prepared(tmp_path)
    killed: list[bool] = []

    def kill() -> None:
        while not list(tmp_path.glob("checkpoints/base/run/checkpoint_*/part-*.json")):
            time.sleep(0.05)
        worker = next(p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::RayTrainW"))
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(not workspace.exists("models/base"))

    killer = threading.Thread(target=kill)
    killer.start()
    done = train(workspace, "base")
    killer.join()
    assert killed == [True], "the worker must die while there are steps left"
    assert (done["figures"]["step"], done["figures"]["blocks_read"]) == (300, 1200)
    one, other = (load_file(Path(w.path("models/base/model.safetensors"))) for w in (whole, workspace))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_run_whose_checkpoint_is_gone_is_forgotten(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    for content in ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}', '{"checkpoint_re'):
        workspace.write_bytes("checkpoints/base/run/checkpoint_manager_snapshot.json", content.encode())
        workspace.write_bytes("checkpoints/base/start/model.safetensors", b"kept")
        forget_broken_run(workspace, "checkpoints/base/run", print)
        assert workspace.list("checkpoints") == ["checkpoints/base/start/model.safetensors"]
        assert "the stage starts again" in capsys.readouterr().out


def test_a_whole_run_is_kept(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write_json(
        "checkpoints/base/run/checkpoint_manager_snapshot.json",
        {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]},
    )
    workspace.write_bytes("checkpoints/base/run/checkpoint_1/part-0.json", b"{}")
    before = workspace.list("checkpoints")
    forget_broken_run(workspace, "checkpoints/base/run", print)
    assert workspace.list("checkpoints") == before


def _tracking(workspace: Workspace) -> str:
    from speechgpt.runtime.tracking import Tracking

    return Tracking.open(recipes.load("tiny").tracking, workspace, "tiny").uri


def test_the_shipped_model_is_trained_on_with_its_own_units_or_as_many_new_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    workspace, recipe = Workspace(tmp_path / "work"), recipes.load("nano")
    shipped = resources.files("speechgpt") / "bundles" / "nano"

    def start(name: str, codebook: bytes) -> Path:
        workspace.write_bytes("encoder/kmeans.safetensors", codebook)
        (tmp_path / name).mkdir()
        train_language._copy_shipped(workspace, tmp_path / name, recipe)
        return tmp_path / name / "model.safetensors"

    with pytest.raises(shell.JobError, match=r"4 units[\s\S]*codebook.clusters"):
        start("few", save({"centroids": np.zeros((4, 2), np.float32)}))
    weights = shipped / "language" / "model.safetensors"
    same = start("same", (shipped / "encoder" / "kmeans.safetensors").read_bytes())
    assert same.read_bytes() == weights.read_bytes()
    sounds = np.random.default_rng(0).standard_normal((500, 7)).astype(np.float32)
    known, new = load_file(weights), load_file(start("new", save({"centroids": sounds})))
    first = Vocabulary.load(shipped / "language").first_unit
    assert known.keys() == new.keys()
    for name, weight in known.items():
        before, after = weight.float().numpy(), new[name].numpy()
        kept = np.ones(len(before), bool)
        if "embed_tokens" in name:
            kept[first : first + 500] = False
            assert not np.isclose(before[~kept], after[~kept]).all(1).any()
            assert after[~kept].std() == pytest.approx(before[~kept].std(), rel=0.01)
        assert np.array_equal(before[kept], after[kept]), name


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 1024}, (512, "stages.base.block")),
        ({"max_position_embeddings": 256}, (256, "language.architecture.max_position_embeddings")),
        ({}, (512, "stages.base.block")),
    ],
)
def test_no_row_is_longer_than_the_model_s_context(tmp_path: Path, config: dict, longest: tuple[int, str]) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_json("models/start/config.json", config)
    assert train_language._longest_row(workspace, "models/start", "base", 512) == longest
