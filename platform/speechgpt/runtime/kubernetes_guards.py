"""What stands around KubeRay's resources: who may connect to a pod, which pods a drain must spare, the Redis that
remembers for the head, and the kustomization that holds them together. Plain Kubernetes; names no Ray type."""

from collections.abc import Sequence

from speechgpt.runtime.manifests import DASHBOARD_PORT, METRICS_PORT, REDIS_SECRET, Manifest, Release, labels

REDIS_IMAGE = "redis:7.2.5-bookworm"
REDIS_PORT = 6379
_REDIS_USER = 999
"""User of the official image."""
_NAMESPACE = "kubernetes.io/metadata.name"
OPERATOR_NAMESPACE = "kuberay-operator"
MONITORING_NAMESPACE = "monitoring"


def guards(release: Release, serving_port: int) -> list[Manifest]:
    """NetworkPolicies and PodDisruptionBudgets of everything that belongs to one recipe."""
    return [*_network_policies(release, serving_port), *_disruption_budgets(release)]


def redis(release: Release) -> list[Manifest]:
    """One Redis with its state on a volume, reached by the recipe's pods alone; the password is in REDIS_SECRET."""
    marks = labels(release) | {"app.kubernetes.io/component": "redis"}
    metadata = {"name": _redis_name(release), "labels": marks}
    password = {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}
    probe = {"exec": {"command": ["sh", "-c", 'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli ping | grep -q PONG']}}
    container = {
        "name": "redis",
        "image": REDIS_IMAGE,
        # Appended and synced each second: a head that comes back needs what was true a moment ago.
        "command": ["sh", "-c", 'exec redis-server --dir /data --appendonly yes --requirepass "$REDIS_PASSWORD"'],
        "env": [{"name": "REDIS_PASSWORD", "valueFrom": password}],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "readinessProbe": probe | {"periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": probe | {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "5Gi"}}},
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _REDIS_USER,
            "fsGroup": _REDIS_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    stateful_set = {
        "serviceName": _redis_name(release),
        "replicas": 1,
        "selector": {"matchLabels": marks},
        "template": {"metadata": {"labels": marks}, "spec": pod},
        "volumeClaimTemplates": [claim],
    }
    service = {"selector": marks, "ports": [{"name": "redis", "port": REDIS_PORT}]}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": stateful_set},
    ]


def kustomization(files: Sequence[str]) -> Manifest:
    """What `kubectl apply -k` applies; an overlay of the operator's own may name this directory as its base."""
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(files)}


def _network_policies(release: Release, serving_port: int) -> list[Manifest]:
    """Nothing comes in but what is named. What goes out stays open: storage and MLflow are outside."""
    own = {"podSelector": {"matchLabels": labels(release)}}
    operator = {"namespaceSelector": {"matchLabels": {_NAMESPACE: OPERATOR_NAMESPACE}}}
    monitoring = {"namespaceSelector": {"matchLabels": {_NAMESPACE: MONITORING_NAMESPACE}}}
    ray = {"key": "app.kubernetes.io/component", "operator": "In", "values": ["cluster", "job", "service"]}
    nodes = {"matchLabels": labels(release), "matchExpressions": [ray]}
    return [
        # Ray's ports are many and partly chosen at run time: the recipe's own pods may use all of them.
        _policy(release, "nodes", nodes, [{"from": [own]}]),
        _policy(release, "operator", nodes, [{"from": [operator], "ports": _ports(DASHBOARD_PORT, serving_port)}]),
        _policy(release, "metrics", nodes, [{"from": [monitoring], "ports": _ports(METRICS_PORT)}]),
        # Callers have the API key or are refused.
        _policy(release, "callers", _part(release, "service"), [{"ports": _ports(serving_port)}]),
        _policy(release, "redis", _part(release, "redis"), [{"from": [own], "ports": _ports(REDIS_PORT)}]),
    ]


def _disruption_budgets(release: Release) -> list[Manifest]:
    """A drain takes a service's nodes one by one, and waits for a job to end: with its head a job loses its run."""
    workers = _part(release, "service")
    workers["matchLabels"] = workers["matchLabels"] | {"ray.io/node-type": "worker"}
    return [
        _budget(release, "service", workers, {"maxUnavailable": 1}),
        _budget(release, "job", _part(release, "job"), {"maxUnavailable": 0}),
    ]


def _policy(release: Release, name: str, pods: Manifest, ingress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{release.instance}-{name}", "labels": labels(release)},
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _budget(release: Release, name: str, pods: Manifest, allowed: Manifest) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{release.instance}-{name}", "labels": labels(release)},
        "spec": {"selector": pods, **allowed},
    }


def _part(release: Release, component: str) -> Manifest:
    return {"matchLabels": labels(release) | {"app.kubernetes.io/component": component}}


def _ports(*numbers: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": number} for number in numbers]


def _redis_name(release: Release) -> str:
    return f"{release.instance}-redis"
