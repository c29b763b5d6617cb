"""A recipe's resources as KubeRay's RayCluster, RayJob and RayService.

Pure functions from numbers to the dictionaries that go into YAML. They share one shape with the AWS file
(aws_cluster.py): a head that schedules and computes nothing, a pool of CPU nodes, a pool of GPU nodes, both growing
from the least to the most the recipe allows; token authentication on; credentials only by reference.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from speechgpt.runtime import proxies
from speechgpt.runtime.config import DeploymentSection, NodeSection, PoolSection, ResourcesSection, ServingSection

Manifest = dict[str, Any]

USER_ID = 1000
"""The user of infra/images/Dockerfile; also that of the AWS machines, so that files mounted from them are readable."""
CREDENTIALS_SECRET = "speechgpt-credentials"
"""Kubernetes secret, if there is one, with AWS_… and MLFLOW_… variables; with a cloud's own roles it is not needed."""
REDIS_SECRET = "speechgpt-redis"
"""Kubernetes secret with the `password` of the Redis that outlives a head."""
RECIPE_PATH = "/etc/speechgpt/recipe.yaml"
STATED = "bundle-stated"
"""The application of the bundle that a Serve config states; named after no digest, for nobody knows it yet."""
API_KEY = "SPEECHGPT_API_KEY"
DRAIN_SECONDS = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How long a node that was told to end lets its replicas finish, before Ray ends its processes; Ray's own is 30."""
DASHBOARD_PORT, METRICS_PORT = 8265, 8080
_UNPRIVILEGED = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "fsGroup": USER_ID,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_TIGHT = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_HEAD = NodeSection(cpus=2, memory_gib=8, gpus=0)
_RAYLET_HEALTH = {"path": "/api/local_raylet_healthz", "port": 52365}
"""Served by Ray's agent on every node, without a token."""
_NOTICE_SECONDS = 30
"""For Ray to end its processes, once a node has drained."""


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

    @property
    def instance(self) -> str:
        """What everything of this recipe is called."""
        return f"speechgpt-{self.name}"


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
    component: str
    """What the cluster is for: `job`, `service` or `cluster`; the guards tell pods apart by it."""
    ports: Mapping[str, int] = field(default_factory=dict)
    ready: Mapping[str, Any] = field(default_factory=lambda: _RAYLET_HEALTH)
    """The HTTP request that says whether traffic may come."""
    environment: Sequence[Manifest] = ()
    farewell_seconds: int = 60
    """From the word to end until it is killed: time for Ray to move what it can."""


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


def ray_cluster(release: Release, resources: ResourcesSection) -> list[Manifest]:
    """A RayCluster that stays, for `speechgpt submit`. Its head may die: what it knew is in Redis."""
    worker = _Container("ray-worker", component="cluster")
    spec = _cluster(release, resources, least_cpu_nodes=0, worker=worker) | _outlives_its_head(release, "cluster")
    return [*_recipe(release), _resource("RayCluster", release, spec)]


def ray_job(
    release: Release, command: Sequence[str], resources: ResourcesSection, job: str = "pipeline", queue: str = ""
) -> list[Manifest]:
    """A RayJob that brings its own cluster up, runs `command` on its head, and takes it down again.

    It is tried again when it fails: jobs resume from what is in the workspace. `queue` is a Kueue LocalQueue; Kueue
    admits a cluster whole, so that one in a queue has its full size at once and Ray's autoscaler is off.
    """
    worker = _Container("ray-worker", component="job")
    cluster = _cluster(release, resources, least_cpu_nodes=0, worker=worker)
    if queue:
        cluster["enableInTreeAutoscaling"] = False
        del cluster["autoscalerOptions"]
        for group in cluster["workerGroupSpecs"]:
            group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    spec = {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 3,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "submitterPodTemplate": _submitter(release),
        "rayClusterSpec": cluster,
    }
    manifest = _resource("RayJob", release, spec)
    if job != "pipeline":
        manifest["metadata"]["name"] += "-" + job.replace(" ", "-")
    if queue:
        manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = queue
    return [*_recipe(release), manifest]


def ray_service(
    release: Release, arguments: Manifest, resources: ResourcesSection, serving: ServingSection
) -> list[Manifest]:
    """A RayService of the gateway and a bundle. arguments: see `serve_config`.

    It keeps as many CPU and GPU nodes as the least number of replicas needs, does not start without an API key in
    CREDENTIALS_SECRET, and answers while its head is away (its state is in Redis).
    """
    cpu_nodes, gpu_nodes = serving_nodes(resources, serving)
    # Replicas finish what they have begun (serve/scaling.py), and neither Ray nor Kubernetes ends a node before that.
    longest_request = math.ceil(serving.request_timeout_seconds)
    worker = _Container(
        "ray-worker",
        component="service",
        ports={"serve": serving.port},
        # The proxy of a node without replicas is down, and traffic must not go there.
        ready={"path": "/-/healthz", "port": serving.port},
        environment=[
            *({"name": name, "value": value} for name, value in proxies.environment(serving).items()),
            {"name": API_KEY, "valueFrom": {"secretKeyRef": {"name": CREDENTIALS_SECRET, "key": API_KEY}}},
            {"name": DRAIN_SECONDS, "value": str(longest_request)},
        ],
        farewell_seconds=longest_request + _NOTICE_SECONDS,
    )
    spec = {
        "serveConfigV2": yaml.safe_dump(serve_config(arguments, serving), sort_keys=False),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(release, resources, cpu_nodes, worker, gpu_nodes)
        | _outlives_its_head(release, "service"),
    }
    return [*_recipe(release), _resource("RayService", release, spec)]


def serve_config(arguments: Manifest, serving: ServingSection) -> Manifest:
    """What `serve deploy` takes, and KubeRay hands on. arguments: of the builders in serve/app.py.

    Two applications, so that a promotion can exchange the bundle's under the gateway.
    """
    traces = serving.traces
    tracing = {"enabled": True, "exporter_import_path": proxies.exporter(traces), "sampling_ratio": traces.share}
    applications = [("gateway", "serve.app:build_gateway", "/"), (STATED, "serve.app:build_bundle", None)]
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": "0.0.0.0",
            "port": serving.port,
            "request_timeout_s": serving.request_timeout_seconds,
        },
        **({"tracing_config": tracing} if traces.share else {}),
        "applications": [
            {"name": name, "import_path": path, "route_prefix": prefix, "args": dict(arguments)}
            for name, path, prefix in applications
        ],
    }


def serving_nodes(resources: ResourcesSection, serving: ServingSection) -> tuple[int, int]:
    """(CPU nodes, GPU nodes) that the least number of replicas needs."""
    deployments = [deployment for _, deployment in _deployments(serving)]
    on_cpus = sum(d.cpus * d.min_replicas for d in deployments if not d.gpus)
    on_gpus = sum(d.gpus * d.min_replicas for d in deployments)
    cpu_nodes = min(math.ceil(on_cpus / resources.cpu_node.cpus), resources.max_cpu_nodes)
    gpu_nodes = math.ceil(on_gpus / resources.gpu_node.gpus) if on_gpus and resources.gpu_node.gpus else 0
    return cpu_nodes, min(gpu_nodes, resources.max_gpu_nodes)


def _resource(kind: str, release: Release, spec: Manifest) -> Manifest:
    metadata: Manifest = {"name": release.instance, "labels": labels(release)}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _recipe(release: Release) -> list[Manifest]:
    if release.recipe_yaml is None:
        return []
    metadata = {"name": f"{release.instance}-recipe", "labels": labels(release)}
    file = {PurePosixPath(RECIPE_PATH).name: release.recipe_yaml}
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": file}]


def _outlives_its_head(release: Release, component: str) -> Manifest:
    """GCS fault tolerance: what the head knows of nodes, actors and replicas is kept in Redis."""
    return {
        "gcsFaultToleranceOptions": {
            "redisAddress": f"{release.instance}-redis:6379",
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}},
            # A cluster and a service of one recipe share the server and not their state.
            "externalStorageNamespace": f"{release.instance}-{component}",
        }
    }


def _submitter(release: Release) -> Manifest:
    """The pod that hands a RayJob's entrypoint to its cluster; KubeRay's own would not be let in by the policies."""
    container = {
        "name": "ray-job-submitter",
        "image": release.image,
        "securityContext": _TIGHT,
        "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
    return {
        "metadata": {"labels": labels(release) | {"app.kubernetes.io/component": "submitter"}},
        "spec": {"restartPolicy": "Never", "securityContext": dict(_UNPRIVILEGED), "containers": [container]},
    }


def _cluster(
    release: Release,
    resources: ResourcesSection,
    least_cpu_nodes: int,
    worker: _Container,
    least_gpu_nodes: int = 0,
) -> Manifest:
    head = replace(
        worker,
        name="ray-head",
        ports={"gcs": 6379, "dashboard": DASHBOARD_PORT, "client": 10001} | dict(worker.ports),
        ready=_RAYLET_HEALTH,
    )
    groups = []
    if resources.max_cpu_nodes:
        pod = _pod(release, worker, resources.cpu_node)
        groups.append(_group("cpu", pod, least_cpu_nodes, resources.max_cpu_nodes))
    if resources.max_gpu_nodes:
        pod = _pod(release, worker, resources.gpu_node)
        groups.append(_group("gpu", pod, least_gpu_nodes, resources.max_gpu_nodes))
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
    ports = {"metrics": METRICS_PORT} | dict(container.ports)
    # Requests equal limits: Ray counts what the limits say, and a pod that exceeds its request is the first to go.
    amounts: Manifest = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi"}
    # A container's own /dev/shm has 64 MB.
    memory = {"medium": "Memory", "sizeLimit": f"{_shared_memory_gib(node)}Gi"}
    volumes: list[Manifest] = [{"name": "shared-memory", "emptyDir": memory}]
    mounts: list[Manifest] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if release.recipe_yaml is not None:
        volumes.append({"name": "recipe", "configMap": {"name": f"{release.instance}-recipe"}})
        mounts.append({"name": "recipe", "mountPath": str(PurePosixPath(RECIPE_PATH).parent), "readOnly": True})
    spec: Manifest = {
        "securityContext": dict(_UNPRIVILEGED),
        "terminationGracePeriodSeconds": container.farewell_seconds,
        "containers": [
            {
                "name": container.name,
                "image": release.image,
                "securityContext": _TIGHT,
                "env": list(container.environment),
                "envFrom": [{"secretRef": {"name": CREDENTIALS_SECRET, "optional": True}}],
                "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
                "resources": {"requests": amounts, "limits": amounts},
                "startupProbe": _probe(_RAYLET_HEALTH, period=5, failures=60),
                "livenessProbe": _probe(_RAYLET_HEALTH, period=10, failures=12),
                "readinessProbe": _probe(container.ready, period=5, failures=3),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if container.name != "ray-head":
        # Only the head's autoscaler speaks to Kubernetes.
        spec["automountServiceAccountToken"] = False
    if node.gpus:
        amounts["nvidia.com/gpu"] = str(node.gpus)
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    marks = labels(release) | {"app.kubernetes.io/component": container.component}
    return {"metadata": {"labels": marks}, "spec": spec}


def _probe(request: Mapping[str, Any], period: int, failures: int) -> Manifest:
    """Seconds between probes, and how many must fail."""
    return {"httpGet": dict(request), "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures}


def _shared_memory_gib(node: NodeSection) -> int:
    """Room for the object store, to which Ray gives 30 % of a node's memory."""
    return math.ceil(0.35 * node.memory_gib)


def labels(release: Release) -> dict[str, str]:
    return {"app.kubernetes.io/name": "speechgpt", "app.kubernetes.io/instance": release.name}


def _workers(
    resources: ResourcesSection, serving: ServingSection, training: TrainingWorkers
) -> Iterator[tuple[str, float, float]]:
    """(key, CPUs, GPUs) of one worker of everything that a recipe runs."""
    yield "engine.cpus_per_worker", training.cpus, training.gpus
    for name, pool in resources:
        if isinstance(pool, PoolSection):
            yield f"resources.{name}", pool.cpus, pool.gpus
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
