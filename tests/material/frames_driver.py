"""The job `fit-units` in a process of its own, on frames that are drawn, not heard: a corpus of any size, at once.

python frames_driver.py WORKSPACE [section.key=value ...]        of the recipe `tiny`, on the cluster of RAY_ADDRESS
"""

import json
import sys

import numpy as np

from jobs import fit_units
from jobs.shell import Context
from speechgpt.recipe import load
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Run
from speechgpt.runtime.workspace import Workspace

CENTRES = 120


class DrawnFeaturizer(fit_units.Featurizer):
    """Only what it hears is another's: lumps of unlike size, the same for the same clip."""

    def _heard(self, clips):
        dimensions = self._features.dimensions
        centres = np.random.default_rng(0).normal(size=(CENTRES, dimensions)).astype(np.float32) * 2
        heard = []
        for clip in clips:
            draw = np.random.default_rng(clip.row)
            count = int(clip.seconds * 50)
            which = (draw.random(count) ** 2 * CENTRES).astype(int)
            heard.append(centres[which] + draw.standard_normal((count, dimensions), np.float32))
        return heard


class Untracked(Run):
    def log_metrics(self, *figures, **more):
        pass


if __name__ == "__main__":
    place, *settings = sys.argv[1:]
    fit_units.Featurizer = DrawnFeaturizer
    context = Context(load("tiny", settings), Workspace(place), Progress(silent=True), Untracked("", ""))
    print(json.dumps(fit_units.run(context)["figures"]))
