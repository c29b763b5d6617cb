"""A bundle on a real Ray Serve, and what can be seen of its replicas from outside."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from serve import records
from serve.bundles import Source, find
from speechgpt.recipe import Recipe

T = TypeVar("T")
DEPLOYMENTS = ("Gateway", "Encoder", "LanguageModel", "Vocoder")


@dataclass(frozen=True)
class Replica:
    """actor: its name."""

    deployment: str
    actor: str
    pid: int

    def ongoing(self) -> int:
        """Requests that it works on, as it counts them itself, now."""
        import ray

        return ray.get(ray.get_actor(self.actor, "serve").get_num_ongoing_requests.remote())

    def rss(self) -> int:
        """Bytes."""
        return psutil.Process(self.pid).memory_info().rss


class LiveService:
    def __init__(self, url: str, source: Source) -> None:
        self.url = url
        self.source = source

    @property
    def applications(self) -> dict[str, str]:
        """Each deployment's application."""
        from serve.app import application_name
        from serve.run import GATEWAY

        return {name: GATEWAY if name == "Gateway" else application_name(self.source) for name in DEPLOYMENTS}

    def replicas(self, deployment: str | None = None) -> list[Replica]:
        """Those that run, of one deployment or all."""
        found = []
        details = records.details()["applications"]
        for name, application in self.applications.items():
            deployed = details.get(application, {"deployments": {}})["deployments"].get(name, {"replicas": []})
            for replica in deployed["replicas"]:
                if replica["state"] == "RUNNING" and deployment in (None, name):
                    found.append(Replica(name, replica["actor_name"], replica["pid"]))
        return found

    def ongoing(self) -> dict[str, int]:
        """Requests under way in each deployment; once there are none, as `replies`, what is left in the language
        model's batches."""
        from ray import serve

        counts = dict.fromkeys(DEPLOYMENTS, 0)
        for replica in self.replicas():
            counts[replica.deployment] += replica.ongoing()
        if any(counts.values()):
            return counts
        handle = serve.get_deployment_handle("LanguageModel", self.applications["LanguageModel"])
        counts["replies"] = sum(handle.broadcast("ongoing").results(timeout_s=60))
        return counts

    def processes(self) -> list[psutil.Process]:
        """Of all replicas."""
        return [psutil.Process(replica.pid) for replica in self.replicas()]

    def proxy(self) -> psutil.Process:
        [found] = records.details()["proxies"].values()
        [pid] = [actor.pid for actor in alive_actors() if actor.name == found["actor_name"]]
        return psutil.Process(pid)


@contextmanager
def live_service(bundle: Path, recipe: Recipe, **serving: Any) -> Iterator[LiveService]:
    """Started as `speechgpt serve` starts it, on a free port, `serving` replacing the recipe's; gone afterwards."""
    from ray import serve

    from serve import run

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = recipe.model_copy(update={"serving": recipe.serving.model_copy(update={"port": port, **serving})})
    source = find(str(bundle), "")
    try:
        run.start(source, chosen)
        yield LiveService(f"http://127.0.0.1:{port}", source)
        run.stop(source)
    finally:
        serve.shutdown()


def replicas_of(recipe: Recipe, count: int, **more: Any) -> dict[str, Any]:
    """`serving` of a recipe with `count` replicas of each deployment, no more and no fewer."""
    parts = ("gateway", "encoder", "language", "vocoder")
    bounds = {"min_replicas": count, "max_replicas": count, **more}
    return {part: getattr(recipe.serving, part).model_copy(update=bounds) for part in parts}


def until(sign: Callable[[], T], seconds: float = 120, every: float = 0.2) -> T:
    """What `sign` says once it is true, or last."""
    deadline = time.monotonic() + seconds
    while not (found := sign()) and time.monotonic() < deadline:
        time.sleep(every)
    return found


def session_directory() -> Path:
    """Where Ray's processes of this cluster write their logs."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def alive_actors() -> list[Any]:
    """Those of the cluster that this process is connected to, as `ray list actors` tells."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    return list(list_actors(address=address, filters=[("state", "=", "ALIVE")], limit=1000))
