"""The job `fit-units` in a process of its own, on a cluster of three nodes of one CPU that it loses nodes of.

python fit_units_driver.py WORKSPACE GROUP_SECONDS LOSSES [section.key=value ...]       of the recipe `tiny`

LOSSES says after how much of what a node vanishes, e.g. `{"frames of the codebook": 3, "passes of k-means": 1}`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from frames_driver import Untracked
from ray.cluster_utils import Cluster
from three_nodes import node

from jobs import fit_units
from jobs.shell import Context
from speechgpt.recipe import load
from speechgpt.runtime.progress import Counter, Progress
from speechgpt.runtime.workspace import Workspace


def fit(workspace: Workspace, *overrides: str, progress: Progress | None = None) -> dict[str, Any]:
    made = fit_units.run(Context(load("tiny", overrides), workspace, progress or Progress(True), Untracked("", "")))
    return made["figures"]


class Losing(Progress):
    """Takes a node away when so much of something is done."""

    def __init__(self, cluster: Cluster, nodes: list, losses: dict[str, int]) -> None:
        super().__init__(silent=True)
        self.cluster, self.nodes, self.losses = cluster, nodes, losses

    @contextmanager
    def count(self, description: str, *args: object, **kwargs: object) -> Iterator[Counter]:
        self.counted = description
        with super().count(description, *args, **kwargs) as counter:
            yield counter

    def _moved(self, counter: Counter) -> None:
        if self.losses.get(self.counted) == counter.done:
            del self.losses[self.counted]
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)


if __name__ == "__main__":
    place, seconds, losses, *settings = sys.argv[1:]
    fit_units._GROUP_SECONDS = float(seconds)
    cluster = Cluster()
    try:
        cluster.add_node(include_dashboard=False, **node())
        nodes = [cluster.add_node(**node()) for _ in range(2)]
        cluster.wait_for_nodes(timeout=300)
        ray.init(address=cluster.address)
        progress = Losing(cluster, nodes, json.loads(losses))
        fit(Workspace(place), *settings, progress=progress)
        assert not progress.losses
        ray.shutdown()
    finally:
        cluster.shutdown()
