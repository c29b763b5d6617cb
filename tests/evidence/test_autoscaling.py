"""Pools that grow with what each step of a pipeline needs and shrink afterwards: Ray's fake cloud, real processes.

The pools are those of the manifest that `speechgpt cluster render --target kuberay` makes of the recipe. No GPU is
needed: training is told apart by the size of its workers, which fit on the nodes of the pool `gpu` only.
"""

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
from hosts import Host, wait_until

from speechgpt.recipe import load
from speechgpt.runtime.manifests import Release, ray_cluster
from speechgpt.runtime.workspace import Workspace

ROOT = Path(__file__).parents[2]
MATERIAL = ROOT / "tests/material"
REPORTS = ROOT / "reports"
ADDRESS = "http://127.0.0.1:8265"
OVERRIDES = (
    "engine.cpus_per_worker=4",
    "resources.cpu_node={cpus: 2}",
    "resources.gpu_node={cpus: 4, gpus: 0}",
    "resources.max_cpu_nodes=2",
    "resources.max_gpu_nodes=2",
    "resources.idle_minutes=1",
    "resources.node_wait_minutes=0.7",
    "stages.base.steps=60",
    "stages.base.checkpoint_every=10",
)

pytestmark = hosts.MARKS


def pools() -> tuple[dict[str, Any], float]:
    """(node types as a cluster.yaml has them, minutes until an idle node goes), from the rendered RayCluster."""
    recipe = load("tiny", OVERRIDES)
    [cluster] = ray_cluster(Release("tiny", "image", "2.60.0"), recipe.resources)
    types = {}
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        types[group["groupName"]] = {
            "resources": {"CPU": int(limits["cpu"]), "object_store_memory": 150 << 20},
            "node_config": {},
            "min_workers": group["minReplicas"],
            "max_workers": group["maxReplicas"],
        }
    return types, cluster["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] / 60


class Cloud:
    """The fake cloud on a host of its own, and the command line there."""

    def __init__(self, v2: bool = True, refused: tuple[str, ...] = ()) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="speechgpt-cloud-"))
        self.host = Host("cloud", self.scratch)
        self.environment = hosts.environment(self.scratch, MATERIAL) | {"SPEECHGPT_API_KEY": secrets.token_hex(16)}
        types, idle = pools()
        wanted = {"types": types, "v2": v2, "refused": refused, "settings": {"idle_timeout_minutes": idle}}
        # Ray gives a node 30 seconds to start, which a busy machine may not have, and no more.
        for _ in range(5):
            done = self.run("python", str(MATERIAL / "autoscaling_cluster.py"), json.dumps(wanted))
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        self._samples = self.scratch / "samples"
        sampler = ("python", str(MATERIAL / "cluster_sampler.py"), "127.0.0.1:6379")
        self.host.start(*sampler, log=self._samples, env=self.environment)

    def run(self, *words: str, timeout: float = 600) -> Any:
        return self.host.run(*words, env=self.environment, cwd=self.scratch, timeout=timeout)

    def speechgpt(self, *words: str, timeout: float = 3600) -> Any:
        return self.run("python", "-m", "speechgpt.cli", *words, "--address", ADDRESS, timeout=timeout)

    def submit(self, *words: str, overrides: tuple[str, ...] = OVERRIDES, **settings: Any) -> Any:
        chosen = [word for override in overrides for word in ("--set", override)]
        return self.speechgpt("submit", *words, "--recipe", "tiny", *chosen, **settings)

    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._samples.read_text().splitlines() if line.startswith("{")]

    def nodes(self) -> dict[str, int]:
        """Living nodes by type, without the head."""
        found = self.samples()
        return {name: n for name, n in found[-1]["nodes"].items() if name in pools()[0]} if found else {}

    def close(self) -> None:
        self.host.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.close()


def spans(place: Workspace) -> dict[str, tuple[float, float]]:
    """{step: (began, ended)}, seconds since the epoch, from what each left when it was done."""
    found = {}
    for marker in Path(place.uri).glob("*/_done/*.json"):
        done = json.loads(marker.read_text())
        ended = marker.stat().st_mtime
        found[done["job"]] = (ended - done["seconds"], ended)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def test_the_pools_grow_with_the_steps_and_shrink_after_them(cloud: Cloud, record_property: Any) -> None:
    """A submitted pipeline makes the cluster grow the pools that each step needs, serving follows, and all shrink."""
    place = Workspace(cloud.scratch / "run")
    began = time.time()
    assert cloud.nodes() == {}, "nothing is there before it is asked for"
    done = cloud.submit("pipeline", "--workspace", place.uri, "--json")
    assert done.returncode == 0, done.stderr[-6000:]
    ended = time.time()
    steps = spans(place)
    wait_until(lambda: cloud.nodes() == {}, 400, f"idle nodes stay: {cloud.nodes()}")
    shrunk = time.time()

    words = ("-m", "jobs.cluster", "render", "--recipe", "tiny", "--target", "aws", "--output")
    assert cloud.run("python", *words, str(cloud.scratch / "aws")).returncode == 0
    config = (
        Path(cloud.scratch / "aws/serve.yaml").read_text().replace("models:/speechgpt-tiny@champion", bundle(place))
    )
    (cloud.scratch / "serve.yaml").write_text(config)
    deployed = time.time()
    done = cloud.run("serve", "deploy", str(cloud.scratch / "serve.yaml"), "--address", ADDRESS)
    assert done.returncode == 0, done.stderr
    # Gateway and bundle.
    up = "    status: RUNNING"
    wait_until(lambda: cloud.run("serve", "status", "-a", ADDRESS).stdout.count(up) == 2, 900, "no service")
    steps["serving"] = (deployed, time.time())
    serving = cloud.nodes()
    assert serving.get("cpu", 0) >= 1, serving
    assert cloud.run("serve", "shutdown", "--yes", "--address", ADDRESS).returncode == 0
    wait_until(lambda: cloud.nodes() == {}, 400, f"idle nodes stay: {cloud.nodes()}")

    samples = [sample for sample in cloud.samples() if sample["at"] >= began - 2]
    timeline = [
        {"seconds": round(s["at"] - began, 1), **{t: s["nodes"].get(t, 0) for t in pools()[0]}} for s in samples
    ]
    bands = {step: [round(start - began, 1), round(end - began, 1)] for step, (start, end) in steps.items()}
    most = {step: most_nodes(timeline, band) for step, band in bands.items()}
    report = {"pools": pools()[0], "steps": bands, "most_nodes_in_step": most, "timeline": timeline}
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / "autoscaling.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(timeline, bands, REPORTS / "autoscaling.png")
    record_property("pipeline, seconds", round(ended - began))
    record_property("until all nodes had gone, seconds after it", round(shrunk - ended))
    record_property("most nodes in each step", most)
    first = min(bands, key=lambda step: bands[step][0] if step.startswith("train-base") else 1e9)
    assert all(row["gpu"] == 0 for row in timeline if row["seconds"] < bands[first][0]), (
        "no training node before training"
    )
    for step in ("train-base", "train-chain"):
        assert most[step]["gpu"] == 2, f"both workers of {step} have a node"
    assert most["tokenize"]["cpu"] >= 1
    assert max(row["cpu"] for row in timeline) <= 2 and max(row["gpu"] for row in timeline) <= 2
    assert most["serving"] == {"cpu": serving["cpu"], "gpu": 0}, "serving takes no training node"


def most_nodes(timeline: list[dict[str, Any]], band: list[float]) -> dict[str, int]:
    inside = [row for row in timeline if band[0] <= row["seconds"] <= band[1]] or [{}]
    return {name: max(row.get(name, 0) for row in inside) for name in pools()[0]}


def bundle(place: Workspace) -> str:
    [manifest] = Path(place.uri).glob("bundles/*/bundle.json")
    return str(manifest.parent)


def plot(timeline: list[dict[str, Any]], bands: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(14, 5))
    for number, (step, (start, end)) in enumerate(bands.items()):
        axes.axvspan(start, end, color=f"C{number % 10}", alpha=0.15, linewidth=0)
        axes.text((start + end) / 2, 2.45, step, rotation=90, ha="center", va="top", fontsize=7)
    seconds = [row["seconds"] for row in timeline]
    for name, style in (("cpu", "-"), ("gpu", "--")):
        axes.step(seconds, [row[name] for row in timeline], style, where="post", linewidth=2, label=f"pool {name}")
    axes.set(xlabel="seconds since the pipeline was submitted", ylabel="living nodes", ylim=(0, 2.5), yticks=(0, 1, 2))
    axes.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def test_a_node_taken_away_comes_back_and_training_ends_the_same(cloud: Cloud, record_property: Any) -> None:
    """A spot node that is killed in the middle of training is replaced, and the stage ends in the same model."""
    unbroken = Workspace(cloud.scratch / "run")
    if not unbroken.exists("models/_done/train-base.json"):
        done = cloud.submit("pipeline", "--workspace", unbroken.uri, "--json")
        assert done.returncode == 0, done.stderr[-6000:]
    broken = Workspace(cloud.scratch / "broken")
    shutil.copytree(
        unbroken.uri, broken.uri, ignore=shutil.ignore_patterns("models", "checkpoints", "bundles", "mlflow")
    )
    done = cloud.submit("train", "base", "--workspace", broken.uri, "--detach")
    assert done.returncode == 0, done.stderr
    identity = done.stdout.split()[0]
    checkpoint = Path(broken.uri) / "checkpoints/base/run"
    wait_until(lambda: list(checkpoint.glob("checkpoint_*")), 900, "no checkpoint")
    killed = cloud.run("python", "-c", KILL_A_RAYLET, "gpu")
    assert killed.returncode == 0, killed.stderr
    assert not broken.exists("models/_done/train-base.json"), "it was killed too late"
    began = time.time()
    wait_until(lambda: cloud.nodes().get("gpu", 0) < 2, 120, "the node is still there")
    wait_until(lambda: cloud.nodes().get("gpu", 0) == 2, 600, "no node came in its place")
    record_property("until a node had come in its place, seconds", round(time.time() - began))
    done = cloud.speechgpt("logs", identity, "--follow")
    assert done.returncode == 0, done.stdout[-6000:]
    before, after = (place.read_json("models/_done/train-base.json") for place in (unbroken, broken))
    assert after["outputs"] == before["outputs"]
    record_property("digest of the model, with and without the loss", after["digest"][:12])


KILL_A_RAYLET = """
import os, sys, psutil
of_type = [
    process for process in psutil.process_iter(["name"])
    if process.info["name"] == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") == sys.argv[1]
]
of_type[0].kill()
"""


def test_a_shape_that_no_node_holds_ends_the_job_with_the_reason(cloud: Cloud) -> None:
    """Workers that fit on no node type are named, with the recipe's key, while the job waits and when it fails."""
    place = cloud.scratch / "enormous"
    enormous = (*OVERRIDES, "resources.synthesis={cpus: 64}", "data.shipped_recordings=false")
    began = time.time()
    done = cloud.submit("synthesize", "--workspace", str(place), overrides=enormous)
    if "manifest has not finished" in done.stdout:
        assert cloud.submit("manifest", "--workspace", str(place), overrides=enormous).returncode == 0
        began = time.time()
        done = cloud.submit("synthesize", "--workspace", str(place), "--again", overrides=enormous)
    assert done.returncode == 1, done.stdout[-3000:]
    assert time.time() - began < 300
    assert "synthesize: waiting for nodes: " in done.stdout
    assert "64 CPUs (resources.synthesis.cpus): no node can hold one" in done.stdout
    assert "resources.cpu_node" in done.stdout
    assert "error: " in done.stdout and "resources.node_wait_minutes" in done.stdout


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_machines_that_the_cloud_refuses_are_named_with_its_reason(v2: bool) -> None:
    """A node type that the cloud has none of is named with the cloud's words or their place, and the job then fails."""
    scarce = Cloud(v2=v2, refused=("cpu", "gpu"))
    try:
        place = scarce.scratch / "run"
        assert scarce.submit("manifest", "--workspace", str(place)).returncode == 0
        done = scarce.submit("synthesize", "--workspace", str(place))
        assert done.returncode == 1, done.stdout[-3000:]
        assert "the cloud refuses cpu: " in done.stdout and "quota" in done.stdout, done.stdout[-3000:]
        told = done.stdout
        if v2:
            # Ray keeps the reason to itself there: the job says where it is to be read.
            assert "the cloud's words are in the head's monitor.log" in told, told[-3000:]
            told = "".join(file.read_text() for file in scarce.scratch.rglob("monitor*"))
        assert "InsufficientInstanceCapacity" in told
    finally:
        scarce.close()
