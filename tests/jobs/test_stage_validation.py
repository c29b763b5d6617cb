"""What a stage's worker does at its looks, with everything real but Ray: model, engine, workspace, rows."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from jobs import held_out, stage_validation
from jobs.stage_validation import StageWatch
from speechgpt import recipe as recipes
from speechgpt.runtime.workspace import Workspace
from speechgpt.training import blocks, engine, loop, packing, starting
from speechgpt.training.export import export
from speechgpt.training.objective import Objective
from speechgpt.training.targets import encode

SETTINGS = (
    "engine.workers=1",
    "stages.base.mixture={transcribe: 1}",
    "stages.base.steps=6",
    "stages.base.checkpoint_every=3",
    "stages.base.validate_every=2",
    "stages.base.answers=2",
    "stages.base.leave=best",
    "generation.max_new_tokens=12",
)


class Told:
    """Stands where figures go to the driver, and for a store without a checkpoint."""

    def __init__(self) -> None:
        self.sent: list[dict] = []

    def send(self, figures: dict) -> None:
        self.sent.append(figures)

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        return iter(())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Told, StageWatch, Path]:
    """A stage of six steps; the rate is so high that some look before the last is the best."""
    folder = tmp_path_factory.mktemp("stage")
    workspace, told = Workspace(folder / "work"), Told()
    recipe = recipes.load("tiny", (*SETTINGS, "stages.base.learning_rate=0.3", "stages.base.schedule=constant"))
    stage, rng = recipe.stages["base"], np.random.default_rng(0)
    rows = []
    for number in range(60):
        units = "".join(f"<{unit}>" for unit in rng.permutation(8)[:5])
        plain = f"[Human]:Say it. This is input: <sosp>{units}<eosp><eoh>.[SpeechGPT]: a dog barks<eos>."
        rows.append(dict(id=f"r{number}", kind="transcribe", prefix="", plain_text=plain, category="", split="train"))
    learnt, held = held_out.divided(pa.Table.from_pylist(rows), stage)
    start = folder / "start"
    starting.write_base(start, recipe.language, None, [row["plain_text"] for row in rows], torch.randn(8, 4), 1)
    vocabulary, prompts = starting.interface(start)
    encoded = [encode(vocabulary, "", text, "all", 1.0) for text in learnt["plain_text"].to_pylist()]
    packed = [packing.pack([encoded[n]], stage.block, vocabulary.pad) for n in range(6 * stage.micro_batch)]
    blocks.write(folder / "blocks.arrow", [blocks.table(range(len(packed)), packed)], stage.block)
    engine.join(recipe.engine)
    model = starting.load(start, gradient_checkpointing=False)
    objective = Objective(model, vocabulary.first_unit, vocabulary.unit_count)
    settings = engine.configuration(recipe.engine, stage, 1)
    started = engine.under_zero(objective, recipe.engine, stage, settings)
    of_stage = blocks.Blocks(folder / "blocks.arrow")
    config = {"recipe": recipe, "workspace": workspace, "stage": "base", "curves": told}
    config["held_out"] = held_out.prepared(held, stage, start)
    watch = StageWatch(config, stage, started, of_stage, vocabulary, prompts)

    def report(figures: dict[str, float], directory: Path | None) -> None:
        told.send(watch.gauges.read(figures))

    loop.train(started, of_stage, stage, report, told, validation=watch.validation)
    export(started, folder / "last")
    return workspace, told, watch, folder


def test_looks_are_told_and_written_down(trained) -> None:
    workspace, told, _, _ = trained
    looks = [figures["step"] for figures in told.sent if "validation_loss" in figures]
    assert looks == [0, 2, 4, 6]
    diary = workspace.read_json("checkpoints/base/validation.json")
    assert list(map(int, diary)) == looks
    summary = stage_validation.summary(workspace, "base")
    assert summary["validation_loss_before"] == diary["0"]["validation_loss"]
    assert summary["validation_best_loss"] == min(look["validation_loss"] for look in diary.values())
    assert stage_validation.summary(workspace, "chain") == {}


def test_the_same_questions_are_answered_at_every_look(trained) -> None:
    _, told, _, _ = trained
    answers = [figures for figures in told.sent if "answers" in figures]
    assert [figures["step"] for figures in answers] == [0, 2, 4, 6]
    asked = {json.dumps([answer["row"] for answer in figures["answers"]]) for figures in answers}
    assert len(asked) == 1
    for figures in answers:
        assert [answer["kind"] for answer in figures["answers"]] == ["transcribe"] * 2
        assert all(answer["finish"] in ("stop", "length") for answer in figures["answers"])


def test_speed_perplexity_and_position_are_told(trained) -> None:
    _, told, _, _ = trained
    last = [figures for figures in told.sent if "tokens_per_second" in figures][-1]
    assert last["mfu"] > 0 and last["perplexity_text"] > 1
    assert last["blocks_seen"] == 6 * 2


def test_the_stage_ends_with_its_best_model(trained, tmp_path: Path) -> None:
    workspace, _, watch, folder = trained
    best = watch.validation.standing.best_step
    assert watch.take_best(tmp_path) and watch.take_best(None)
    kept = load_file(workspace.path(f"checkpoints/base/best/step-{best:07}/model.safetensors"))
    taken = load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(kept[name], taken[name]) for name in kept)
    starting.interface(tmp_path)
    last = load_file(folder / "last" / "model.safetensors")
    assert all(np.array_equal(last[name], taken[name]) for name in last) == (best == 6)


def test_models_that_no_attempt_comes_back_to_are_removed(trained) -> None:
    workspace, _, watch, _ = trained
    for step in (10, 20, 30, 40):
        workspace.write_bytes(f"checkpoints/base/best/step-{step:07}/model.safetensors", b"")
    # Two checkpoints of three steps are kept: an attempt may start again from step 34, where 30 was the best.
    watch._forget_older(40)
    kept = {name.split("/")[3] for name in workspace.list("checkpoints/base/best")}
    assert kept == {"step-0000030", "step-0000040"}
