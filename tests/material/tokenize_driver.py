"""The job `tokenize` in a process of its own, so that it can be killed.

python tokenize_driver.py WORKSPACE [section.key=value ...]        of the recipe `tiny`, on the cluster of RAY_ADDRESS
"""

import sys

from jobs.shell import Context
from jobs.tokenize_speech import run
from speechgpt.recipe import load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace


def tokenize(workspace: Workspace, *overrides: str) -> dict:
    return run(Context(load("tiny", overrides), workspace, Progress(silent=True), Run("", "")))


if __name__ == "__main__":
    place, *settings = sys.argv[1:]
    print(tokenize(Workspace(place), *settings)["figures"])
