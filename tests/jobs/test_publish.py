"""From what training left to a bundle, a registered version and an alias."""

from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from jobs import publish
from jobs.shell import Context, JobError
from speechgpt.recipe import Recipe, load
from speechgpt.runtime import bundle
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking, TrackingError, pin
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import hubert
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.vocoder import UnitVocoder, Vocoder


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("tiny")


@pytest.fixture
def trained(tmp_path: Path, recipe: Recipe) -> Workspace:
    """A workspace as the training jobs leave it, with what they keep beside their results."""
    place = Workspace(tmp_path / "work")
    with place.stage("encoder") as folder:
        hubert.save(hubert.scratch(recipe.encoder.architecture, seed=1), folder, layer=2, normalize=True)
        Codebook(torch.randn(32, 64, generator=torch.Generator().manual_seed(1))).save(folder)
    with place.stage("vocoder") as folder:
        Vocoder(UnitVocoder(recipe.vocoder.generator, 32)).save(folder)
    for stage in ("base", "adaptation", "crossmodal", "chain"):
        place.write_json(f"models/{stage}/config.json", {"stage": stage})
    place.write_bytes("encoder/iterations/1/teacher.safetensors", b"not the bundle's")
    done = {"job": "train-chain", "run_id": "r1", "digest": "d1"}
    place.write_json("models/_done/train-chain.json", done)
    place.write_json("models/_done/train-base.started.json", {"run_id": "r2"})
    return place


def run_publish(recipe: Recipe, place: Workspace) -> dict:
    tracking = Tracking.open(recipe.tracking, place, recipe.name)
    with tracking.run("publish") as run:
        return publish.run(Context(recipe, place, Progress(silent=True), run))


def test_what_was_trained_is_sealed_registered_and_promoted(trained, recipe):
    done = run_publish(recipe, trained)
    loaded = bundle.load(trained.path("bundles/tiny"))
    assert loaded.digest == done["figures"]["bundle_digest"]
    assert {name.partition("/")[0] for name in loaded.manifest["files"]} == {
        "encoder",
        "language",
        "adapter",
        "vocoder",
    }
    assert "encoder/iterations/1/teacher.safetensors" not in loaded.manifest["files"]
    assert (loaded.directory / "language" / "config.json").read_text().count("crossmodal") == 1
    assert (loaded.directory / "adapter" / "config.json").read_text().count("chain") == 1
    assert loaded.manifest["unit_vocabulary"]["size"] == 32
    assert loaded.manifest["lineage"]["jobs"] == {"train-chain": {"run_id": "r1", "digest": "d1"}}
    assert Recipe.model_validate(yaml.safe_load(loaded.manifest["lineage"]["recipe"])) == recipe

    promoted = publish.promote(recipe, trained, "champion")
    tracking = Tracking.open(recipe.tracking, trained, recipe.name)
    assert promoted["model"] == "models:/speechgpt-tiny@champion"
    assert bundle.load(tracking.resolve(promoted["model"])).digest == loaded.digest
    assert run_publish(recipe, trained)["figures"]["version"] == done["figures"]["version"], (
        "the same bytes, the same version"
    )


def test_an_alias_moves_by_digest_and_goes_back_only_from_there(trained, recipe):
    first = run_publish(recipe, trained)["figures"]
    trained.delete("bundles")
    trained.write_json("models/crossmodal/config.json", {"stage": "another"})
    second = run_publish(recipe, trained)["figures"]
    tracking = Tracking.open(recipe.tracking, trained, recipe.name)
    alias = publish.RegistryAlias(tracking, "champion")
    assert tracking.version_named("champion") is None
    alias.leave(second["bundle_digest"], first["bundle_digest"])
    assert tracking.version_named("champion") is None
    alias.move(second["bundle_digest"])
    assert tracking.version_named("champion") == str(second["version"])
    alias.move("0" * 64)
    assert tracking.version_named("champion") == str(second["version"]), "what is not registered has no name"
    alias.leave(first["bundle_digest"], second["bundle_digest"])
    assert tracking.version_named("champion") == str(second["version"])
    alias.leave(second["bundle_digest"], first["bundle_digest"])
    assert tracking.version_named("champion") == str(first["version"])
    publish.RegistryAlias(None, "champion").move(second["bundle_digest"])


def test_a_pinned_address_stays_when_the_alias_moves(trained, recipe):
    made = run_publish(recipe, trained)["figures"]
    publish.promote(recipe, trained, "champion")
    tracking = Tracking.open(recipe.tracking, trained, recipe.name)
    assert pin("models:/speechgpt-tiny@champion", tracking.uri) == f"models:/speechgpt-tiny/{made['version']}"
    assert pin("models:/speechgpt-tiny/7", tracking.uri) == "models:/speechgpt-tiny/7"
    with pytest.raises(TrackingError, match="speechgpt-tiny@nobody"):
        pin("models:/speechgpt-tiny@nobody", tracking.uri)


@pytest.mark.parametrize(
    "words", [["nano"], ["--abort"], ["--state"], ["nano", "--address", "http://head:8265"]], ids=" ".join
)
def test_a_service_must_be_named_to_go_over_to_a_bundle(words, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    app = typer.Typer()
    app.command()(publish.promote_command)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert ("speechgpt submit promote" if "--address" in words else "--address") in done.stderr


def test_a_part_that_is_missing_is_named(trained, recipe):
    trained.delete("encoder/kmeans.safetensors")
    with pytest.raises(JobError, match=r"kmeans.safetensors is missing: the bundle's encoder"):
        run_publish(recipe, trained)
    assert not trained.exists("bundles/tiny"), "nothing half-written stands there"


def test_promoting_nothing_says_what_to_run(tmp_path, recipe):
    with pytest.raises(JobError, match="run publish first"):
        publish.promote(recipe, Workspace(tmp_path), "champion")


def test_the_last_whole_model_is_served_with_the_adapter_that_belongs_to_it(recipe):
    assert publish.stages(recipe) == ("crossmodal", "chain")
    whole = load("tiny", ("stages.chain.lora=null",))
    assert publish.stages(whole) == ("chain", None)


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(JobError, match="the last whole model is 'crossmodal'"):
        publish.stages(load("tiny", ("stages.chain.start_from=adaptation",)))
