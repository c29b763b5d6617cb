"""A recipe's resources as the files that clusters are made from: KubeRay's RayJob and RayService, Ray's AWS autoscaler.

Pure functions from numbers to the dictionaries that go into YAML. The three share one shape: a head that schedules and
computes nothing, a pool of CPU nodes, a pool of GPU nodes, both growing from the least to the most the recipe allows;
token authentication on; credentials only by reference (instance role, Kubernetes secret).
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from speechgpt.runtime.config import DeploymentSection, NodeSection, ResourcesSection, ServingSection

Manifest = dict[str, Any]

USER_ID = 1000
"""The user of infra/images/Dockerfile; also that of the AWS machines, so that files mounted from them are readable."""
CREDENTIALS_SECRET = "speechgpt-credentials"
"""Kubernetes secret, if there is one, with AWS_… and MLFLOW_… variables; with a cloud's own roles it is not needed."""
RECIPE_PATH = "/etc/speechgpt/recipe.yaml"
API_KEY = "SPEECHGPT_API_KEY"
PROXY_CALLBACK = "serve.guard:proxy_middlewares"
"""Refuses oversized bodies before Serve reads them; named, not imported: the serving code stands above this room."""
_HEAD = NodeSection(cpus=2, memory_gib=8, gpus=0)
_HEAD_INSTANCE = "m6i.xlarge"
_HEAD_PROFILE, _NODE_PROFILE = "speechgpt-head", "speechgpt-node"
_RAYLET_HEALTH = {"path": "/api/local_raylet_healthz", "port": 52365}
"""Served by Ray's agent on every node, without a token."""


class ManifestError(ValueError):
    """Resources that no cluster of this recipe could give; the message names the key."""


@dataclass(frozen=True)
class Release:
    """What is to run, and from which image."""

    name: str
    """The recipe's name; resources are called after it."""
    image: str
    ray_version: str
    recipe_yaml: str | None = None
    """A recipe that the image does not have: every pod finds it at RECIPE_PATH."""


@dataclass(frozen=True)
class TrainingWorkers:
    """The workers of a training stage, which all run at once."""

    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class _Container:
    """What the nodes of one kind have beside their size."""

    name: str
    ports: Mapping[str, int] = field(default_factory=dict)
    ready: Mapping[str, Any] = field(default_factory=lambda: _RAYLET_HEALTH)
    """The HTTP request that says whether traffic may come."""
    environment: Sequence[Manifest] = ()


def check_demand(resources: ResourcesSection, serving: ServingSection, training: TrainingWorkers) -> None:
    """Raises ManifestError if some worker fits on no node, or the stages' workers do not fit together.

    Ray would wait for such a node forever.
    """
    for key, cpus, gpus in _workers(resources, serving, training):
        node, most, pool = _pool(resources, gpus)
        if most == 0:
            raise ManifestError(f"{key} asks for a {pool} node, and resources.max_{pool}_nodes is 0")
        if cpus > node.cpus or gpus > node.gpus:
            raise ManifestError(
                f"{key} asks for {cpus:g} CPUs and {gpus:g} GPUs at once; a node of resources.{pool}_node has "
                f"{node.cpus} and {node.gpus}"
            )
    node, most, pool = _pool(resources, training.gpus)
    room = most * min(_times(node.cpus, training.cpus), _times(node.gpus, training.gpus))
    if training.count > room:
        raise ManifestError(
            f"engine.workers: {training.count} run at once, and resources.max_{pool}_nodes {most} has room for {room:g}"
        )


def ray_job(release: Release, command: Sequence[str], resources: ResourcesSection) -> list[Manifest]:
    """A RayJob that brings its own cluster up, runs `command` on its head, and takes it down again.

    It is tried again when it fails: jobs resume from what is in the workspace.
    """
    spec = {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 3,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(release, resources, least_cpu_nodes=0, worker=_Container("ray-worker")),
    }
    return [*_recipe(release), _resource("RayJob", release, spec)]


def ray_service(
    release: Release, application: Manifest, resources: ResourcesSection, serving: ServingSection
) -> list[Manifest]:
    """A RayService with one Serve `application` (`name, import_path, route_prefix, args`).

    It keeps as many CPU nodes as the least number of replicas needs, and does not start without an API key in
    CREDENTIALS_SECRET.
    """
    config = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",
            "port": serving.port,
            "request_timeout_s": serving.request_timeout_seconds,
        },
        "applications": [application],
    }
    on_cpus = [deployment for _, deployment in _deployments(serving) if not deployment.gpus]
    least = math.ceil(sum(d.cpus * d.min_replicas for d in on_cpus) / resources.cpu_node.cpus)
    worker = _Container(
        "ray-worker",
        ports={"serve": serving.port},
        # The proxy of a node without replicas is down, and traffic must not go there.
        ready={"path": "/-/healthz", "port": serving.port},
        environment=[
            {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": PROXY_CALLBACK},
            {"name": API_KEY, "valueFrom": {"secretKeyRef": {"name": CREDENTIALS_SECRET, "key": API_KEY}}},
        ],
    )
    spec = {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(release, resources, min(least, resources.max_cpu_nodes), worker),
    }
    return [*_recipe(release), _resource("RayService", release, spec)]


def aws_cluster(release: Release, resources: ResourcesSection, region: str) -> Manifest:
    """The file of `ray up`: an on-demand head, on-demand CPU nodes, GPU nodes from the spot market."""
    nodes: Manifest = {"head": {"resources": {"CPU": 0}, "node_config": _instance(_HEAD_INSTANCE, _HEAD_PROFILE)}}
    # Resources left empty are filled in by `ray up` from the instance type.
    if resources.max_cpu_nodes:
        nodes["cpu"] = {
            "min_workers": 0,
            "max_workers": resources.max_cpu_nodes,
            "resources": {},
            "node_config": _instance(resources.node_type_cpu, _NODE_PROFILE),
        }
    if resources.max_gpu_nodes:
        spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
        nodes["gpu"] = {
            "min_workers": 0,
            "max_workers": resources.max_gpu_nodes,
            "resources": {},
            "node_config": _instance(resources.node_type_gpu, _NODE_PROFILE) | spot,
        }
    start = "ulimit -n 65536; ray start --disable-usage-stats"
    return {
        "cluster_name": f"speechgpt-{release.name}",
        "max_workers": resources.max_cpu_nodes + resources.max_gpu_nodes,
        "idle_timeout_minutes": resources.idle_minutes,
        # Stopped machines would keep their disks, and a spot machine cannot be stopped.
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": release.image,
            "container_name": "speechgpt",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", "--env RAY_AUTH_MODE=token"],
        },
        "available_node_types": nodes,
        "head_node_type": "head",
        # The token of the machine that runs `ray up`; made there by `ray get-auth-token --generate`.
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        # The image has everything; Ray's defaults would install its nightly build.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            # The dashboard stays on the head's loopback; `ray dashboard` brings it through SSH.
            f"{start} --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _resource(kind: str, release: Release, spec: Manifest) -> Manifest:
    metadata = {"name": f"speechgpt-{release.name}", "labels": _labels(release)}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _recipe(release: Release) -> list[Manifest]:
    if release.recipe_yaml is None:
        return []
    metadata = {"name": f"speechgpt-{release.name}-recipe", "labels": _labels(release)}
    file = {PurePosixPath(RECIPE_PATH).name: release.recipe_yaml}
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": file}]


def _cluster(release: Release, resources: ResourcesSection, least_cpu_nodes: int, worker: _Container) -> Manifest:
    head = replace(
        worker,
        name="ray-head",
        ports={"gcs": 6379, "dashboard": 8265, "client": 10001} | dict(worker.ports),
        ready=_RAYLET_HEALTH,
    )
    groups = []
    if resources.max_cpu_nodes:
        pod = _pod(release, worker, resources.cpu_node)
        groups.append(_group("cpu", pod, least_cpu_nodes, resources.max_cpu_nodes))
    if resources.max_gpu_nodes:
        pod = _pod(release, worker, resources.gpu_node)
        groups.append(_group("gpu", pod, 0, resources.max_gpu_nodes))
        if resources.accelerator:
            groups[-1]["labels"] = {"ray.io/accelerator-type": resources.accelerator}
    return {
        "rayVersion": release.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": resources.idle_minutes * 60},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(release, head, _HEAD),
        },
        "workerGroupSpecs": groups,
    }


def _group(name: str, pod: Manifest, least: int, most: int) -> Manifest:
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": pod,
    }


def _pod(release: Release, container: _Container, node: NodeSection) -> Manifest:
    # Requests equal limits: Ray counts what the limits say, and a pod that exceeds its request is the first to go.
    amounts: Manifest = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi"}
    # A container's own /dev/shm has 64 MB.
    memory = {"medium": "Memory", "sizeLimit": f"{_shared_memory_gib(node)}Gi"}
    volumes: list[Manifest] = [{"name": "shared-memory", "emptyDir": memory}]
    mounts: list[Manifest] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if release.recipe_yaml is not None:
        volumes.append({"name": "recipe", "configMap": {"name": f"speechgpt-{release.name}-recipe"}})
        mounts.append({"name": "recipe", "mountPath": str(PurePosixPath(RECIPE_PATH).parent), "readOnly": True})
    spec: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container.name,
                "image": release.image,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "env": list(container.environment),
                "envFrom": [{"secretRef": {"name": CREDENTIALS_SECRET, "optional": True}}],
                "ports": [{"name": name, "containerPort": port} for name, port in container.ports.items()],
                "resources": {"requests": amounts, "limits": amounts},
                "startupProbe": _probe(_RAYLET_HEALTH, period=5, failures=60),
                "livenessProbe": _probe(_RAYLET_HEALTH, period=10, failures=12),
                "readinessProbe": _probe(container.ready, period=5, failures=3),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if node.gpus:
        amounts["nvidia.com/gpu"] = str(node.gpus)
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": _labels(release)}, "spec": spec}


def _probe(request: Mapping[str, Any], period: int, failures: int) -> Manifest:
    """Seconds between probes, and how many must fail."""
    return {"httpGet": dict(request), "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures}


def _shared_memory_gib(node: NodeSection) -> int:
    """Room for the object store, to which Ray gives 30 % of a node's memory."""
    return math.ceil(0.35 * node.memory_gib)


def _labels(release: Release) -> dict[str, str]:
    return {"app.kubernetes.io/name": "speechgpt", "app.kubernetes.io/instance": release.name}


def _instance(instance_type: str, profile: str) -> Manifest:
    return {
        "InstanceType": instance_type,
        # Where the keys to storage come from: a role that the operator made, named in infra/README.md.
        "IamInstanceProfile": {"Name": profile},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 150, "VolumeType": "gp3", "Encrypted": True}}
        ],
        # The role's keys answer only to IMDSv2, which a forged request cannot speak; a container is one hop further.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }


def _workers(
    resources: ResourcesSection, serving: ServingSection, training: TrainingWorkers
) -> Iterator[tuple[str, float, float]]:
    """(key, CPUs, GPUs) of one worker of everything that a recipe runs."""
    yield "engine.cpus_per_worker", training.cpus, training.gpus
    yield "resources.synthesis", resources.synthesis.cpus, resources.synthesis.gpus
    yield "resources.tokenisation", resources.tokenisation.cpus, resources.tokenisation.gpus
    for name, deployment in _deployments(serving):
        yield f"serving.{name}", deployment.cpus, deployment.gpus


def _deployments(serving: ServingSection) -> list[tuple[str, DeploymentSection]]:
    return [(name, part) for name, part in serving if isinstance(part, DeploymentSection)]


def _pool(resources: ResourcesSection, gpus: float) -> tuple[NodeSection, int, str]:
    if gpus:
        return resources.gpu_node, resources.max_gpu_nodes, "gpu"
    return resources.cpu_node, resources.max_cpu_nodes, "cpu"


def _times(whole: float, part: float) -> float:
    return math.floor(whole / part) if part else math.inf
