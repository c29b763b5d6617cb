import pytest

from jobs import train_encoder
from jobs.shell import Context, JobError
from speechgpt.recipe import load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace


def test_an_objective_that_the_job_has_not_is_refused(tmp_path):
    recipe = load("tiny", ("encoder.training.objective=masked",))
    with pytest.raises(JobError, match=r"encoder\.training\.objective"):
        train_encoder.run(Context(recipe, Workspace(tmp_path), Progress(silent=True), Run("", "")))
