"""Figures of a training on their way to MLflow."""

from typing import Any

import pytest
from mlflow import MlflowClient

from jobs.shell import Context
from jobs.training_curves import training_curves
from speechgpt import recipe as recipes
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace


@pytest.mark.ray
def test_samples_that_cannot_be_shown_cost_no_later_figure(ray_cluster, run_directory, caplog):
    recipe, workspace = recipes.load("tiny"), Workspace(run_directory)
    heard = []

    def listen(step: int, answers: list[dict[str, Any]]) -> None:
        if step == 1:
            raise RuntimeError("no vocoder")
        heard.append(step)

    with Tracking.open(recipe.tracking, workspace, "tiny").run("train") as run:
        context = Context(recipe, workspace, Progress(silent=True), run)
        with training_curves(context, "base", 2, listen) as curves:
            for step in (1, 2):
                curves.send({"step": step, "loss": 1.0 / step, "answers": [{"text": "yes"}]})
    assert heard == [2] and "step 1 is not in MLflow" in caplog.text
    assert [point.step for point in MlflowClient(run.uri).get_metric_history(run.id, "loss")] == [1, 2]
