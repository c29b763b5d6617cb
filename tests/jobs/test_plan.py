"""`speechgpt plan` as a user calls it."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs import plan
from speechgpt.recipe import RecipeError, load

app = typer.Typer()
app.command()(plan.main)


def called(*words: str):
    return CliRunner().invoke(app, words)


def test_seven_billion_parameters_are_planned_without_a_file_of_theirs(capfd):
    done = called("--recipe", "speechgpt-7b", "--gpus", "16xA100-80", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(capfd.readouterr().out)
    stages = {stage["stage"]: stage for stage in answer["stages"]}
    # LLaMA's 6,738,415,616 and 1006 rows of 4096 in two tables.
    assert stages["adaptation"]["parameters"] == 6_738_415_616 + 2 * 1006 * 4096
    # Rank 8 on q and v of 32 layers.
    assert stages["chain"]["trainable_parameters"] == 32 * 2 * 8 * 2 * 4096
    assert stages["adaptation"]["checkpoint_bytes"] == 14 * stages["adaptation"]["parameters"]
    assert answer["fits"] and answer["assumed"]["prices"]["as_of"]
    assert answer["total"]["cost"] == pytest.approx(sum(stage["cost"] for stage in answer["stages"]))


def test_what_cannot_fit_fails_and_says_what_would():
    done = called("--recipe", "small", "--gpus", "1xL4-24", "--set", "stages.base.micro_batch=256")
    assert done.exit_code == 1
    assert "base cannot run: a worker needs" in done.output and "would fit with" in done.output


def test_wrong_words_are_named(tmp_path: Path):
    assert "no kind" in called("--recipe", "nano", "--gpus", "4xB52").output
    with pytest.raises(RecipeError, match="language.architecture"):
        plan.grown(load("nano", (f"language.base={tmp_path / 'absent'}",)))


def test_scratch_and_shipped_models_have_the_vocabulary_they_will_have():
    assert plan.grown(load("nano")).vocab_size == 1344
    shipped = plan.grown(load("nano", ("language.base=shipped", "codebook.init=shipped")))
    assert shipped.vocab_size % 64 == 0
