"""What a job waits for that its cluster cannot give: told in words while it waits, and in the end an error.

Ray lets a task, an actor or a group of training workers wait without end for a node that will never come: its shape
fits no node type, the pool is as large as it may be, or the cloud refuses machines. Here somebody looks.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

    from speechgpt.recipe import Recipe

LOOK_SECONDS = 5.0
SAY_SECONDS = 20.0
"""A demand that fits nothing is told when it has stood for so long: the autoscaler needs some of it to react."""
SIGN = "waiting for nodes: "
"""How the lines begin that `speechgpt status` repeats while a job runs."""
OVER = "the nodes are there"

Shape = Mapping[str, float]
"""{resource: amount}, as Ray counts them: CPU, GPU, memory (bytes), those of the cluster's own."""


class WaitingError(RuntimeError):
    """The cluster cannot give what the job asks for; the message says what, why and which key of the recipe asks."""


@dataclass(frozen=True)
class Demand:
    """What Ray has not placed yet."""

    shape: Shape
    count: int
    together: bool
    """Training workers start all at once or not at all; tasks and actors one by one."""

    def __str__(self) -> str:
        asked = " and ".join(f"{_amount(name, value)}" for name, value in sorted(self.shape.items()))
        return f"{self.count} × {asked}{' at once' if self.together and self.count > 1 else ''}"


@dataclass(frozen=True)
class Supply:
    """What a cluster has, gets and is refused."""

    nodes: tuple[Shape, ...]
    """Everything each living node has, busy or not."""
    coming: tuple[str, ...] = ()
    """Types of the nodes that are being started."""
    refused: tuple[str, ...] = ()
    """`node type: the cloud's reason`, of the last attempts to start one."""


def unplaceable(demands: list[Demand], supply: Supply) -> list[Demand]:
    """The demands that these nodes could not take even if they were idle. The others only wait for their turn."""
    return [demand for demand in demands if not _fits(demand, supply.nodes)]


def explain(demand: Demand, supply: Supply, keys: list[str]) -> str:
    """Why it waits, and what to do. `keys` are the recipe's keys that ask for this shape."""
    by = f" ({', '.join(keys)})" if keys else ""
    if supply.refused:
        remedy = "raise the quota, or name another resources.node_type_cpu, node_type_gpu or region"
        return f"{demand}{by}: the cloud refuses {'; '.join(supply.refused)}: {remedy}"
    if supply.coming:
        return f"{demand}{by}: {', '.join(supply.coming)} is being started"
    whole = [node for node in supply.nodes if node]
    if any(_holds(node, demand.shape) for node in whole):
        held = sum(_times(node, demand.shape) for node in whole)
        return (
            f"{demand}{by}: the nodes that there are, and may be, hold {held:g} of them at once: fewer, or a larger "
            "pool (resources.max_cpu_nodes, max_gpu_nodes)"
        )
    largest = ", ".join(
        _amount(name, max(node.get(name, 0) for node in whole or [{}])) for name in sorted(demand.shape)
    )
    return (
        f"{demand}{by}: no node can hold one; the largest there is has {largest}, and no larger one is being started: "
        "ask for less, or give the cluster such nodes (resources.cpu_node, gpu_node, max_cpu_nodes, max_gpu_nodes)"
    )


def latest(log: str) -> str:
    """What a job waits for by the end of its log; empty if for nothing."""
    told = [line for line in log.splitlines() if SIGN in line or line.endswith(OVER)]
    return told[-1].partition(SIGN)[2] if told else ""


def keys_of(shape: Shape, recipe: "Recipe") -> list[str]:
    """The recipe's keys that ask for as many CPUs and GPUs."""
    from speechgpt.runtime.config import PoolSection

    engine = recipe.engine
    asked = {"engine.cpus_per_worker": (engine.cpus_per_worker, engine.gpus_per_worker)}
    for name, pool in recipe.resources:
        if isinstance(pool, PoolSection):
            asked[f"resources.{name}.cpus"] = (pool.cpus, pool.gpus)
    wanted = (shape.get("CPU", 0), shape.get("GPU", 0))
    return [key for key, amounts in asked.items() if amounts == wanted]


class Waits:
    """Remembers since when each demand has been unplaceable, and says it once. Seconds of one clock."""

    def __init__(self, recipe: "Recipe", patience: float, say: Callable[[str], None]) -> None:
        self._recipe, self._patience, self._say = recipe, patience, say
        self._since: dict[tuple[Any, ...], float] = {}
        self._told: dict[tuple[Any, ...], str] = {}

    def look(self, demands: list[Demand], supply: Supply, now: float) -> str | None:
        """Why the job must end, once a demand has waited for longer than `patience`."""
        waiting = {_identity(demand): demand for demand in unplaceable(demands, supply)}
        self._since = {known: self._since.get(known, now) for known in waiting}
        if self._told and not waiting:
            self._say(OVER)
        self._told = {known: text for known, text in self._told.items() if known in waiting}
        for known, demand in waiting.items():
            waited = now - self._since[known]
            text = explain(demand, supply, keys_of(demand.shape, self._recipe))
            if waited > self._patience:
                return f"{text}. Waited {waited / 60:.1f} min (resources.node_wait_minutes)"
            kind = text.partition(": ")[2]
            unmet = supply.refused or not supply.coming
            if waited >= SAY_SECONDS and unmet and self._told.get(known) != kind:
                self._told[known] = kind
                self._say(
                    f"{SIGN}{text}; the job fails after {self._patience / 60:g} min (resources.node_wait_minutes)"
                )
        return None


@contextmanager
def watched(recipe: "Recipe", say: Callable[[str], None]) -> Iterator[None]:
    """Around work on Ray in a process's main thread: raises WaitingError in it when the cluster cannot give the nodes.

    Elsewhere than in the main thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, verdict = threading.Event(), list[str]()
    waits = Waits(recipe, recipe.resources.node_wait_minutes * 60, say)

    def watch() -> None:
        blind = ""
        while not over.wait(LOOK_SECONDS):
            try:
                reason = _look(waits)
            except Exception as error:  # noqa: BLE001 - a cluster out of reach for a while ends no job
                if blind != (blind := f"{type(error).__name__}: {error}"):
                    say(f"what the cluster has cannot be seen: {blind}")
                continue
            if reason and not over.is_set():
                verdict.append(reason)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    def interrupt(*_: object) -> None:
        # Of what a signal raises while it waits, Ray lets nothing else through.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, name="waiting for nodes", daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if verdict:
            raise WaitingError(verdict[0]) from None
        raise
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)


def _look(waits: Waits) -> str | None:
    if "ray" not in sys.modules:
        # Not every job comes to Ray, whose import takes a second of a processor.
        return None
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    if not ray.is_initialized():
        return None
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    supply = _supply(status)
    demands = unplaceable(_demands(status), supply)
    return waits.look(_of_this_job(demands) if demands else [], supply, time.monotonic())


def _demands(status: "ClusterStatus") -> list[Demand]:
    asked = status.resource_demands
    found = []
    for together, parts in ((False, asked.ray_task_actor_demand), (True, asked.placement_group_demand)):
        found += [Demand(each.bundle, each.count, together) for part in parts for each in part.bundles_by_count]
    return [replace(demand, shape=_counted(demand.shape)) for demand in found]


def _supply(status: "ClusterStatus") -> Supply:
    nodes = tuple(node.total_resources() for node in status.active_nodes + status.idle_nodes)
    coming = [launch.ray_node_type_name for launch in status.pending_launches]
    coming += [node.ray_node_type_name for node in status.pending_nodes]
    refused = [f"{launch.ray_node_type_name}: {_reason(launch.details)}" for launch in status.failed_launches]
    report = _first_autoscalers_report()
    coming += list(report.get("pending_launches") or {}) + [node[1] for node in report.get("pending_nodes") or []]
    for name, found in ((report.get("node_availability_summary") or {}).get("node_availabilities") or {}).items():
        if not found["is_available"]:
            why = found.get("unavailable_node_information") or {}
            refused.append(f"{name}: {why.get('category', '')} {why.get('description', '')}".strip())
    return Supply(nodes, tuple(sorted(set(coming))), tuple(sorted(set(refused))))


def _reason(details: str | None) -> str:
    """Ray's second autoscaler has no words of a cloud whose provider is one of the first's."""
    return details or "Ray does not say why; the cloud's words are in the head's monitor.log"


def _first_autoscalers_report() -> dict[str, Any]:
    """What Ray's first autoscaler (`ray up`) has done; the second (KubeRay) says it in the cluster's status itself."""
    from ray.experimental.internal_kv import _internal_kv_get

    written = _internal_kv_get("__autoscaling_status")
    return (json.loads(written).get("autoscaler_report") or {}) if written else {}


def _of_this_job(demands: list[Demand]) -> list[Demand]:
    """Those that this process's tasks, actors and groups ask for: a cluster may have other jobs."""
    import ray
    from ray.util.state import list_actors, list_placement_groups, list_tasks

    context = ray.get_runtime_context()
    job, at = context.get_job_id(), context.gcs_address
    of_creator: list[Any] = [("creator_job_id", "=", job), ("state", "!=", "REMOVED")]
    groups = list_placement_groups(at, filters=of_creator, detail=True)
    bundles = [_counted(bundle["unit_resources"]) for group in groups for bundle in group.bundles or []]
    waiting: list[Any] = [
        *list_tasks(at, filters=[("job_id", "=", job), ("state", "=", "PENDING_NODE_ASSIGNMENT")], detail=True),
        *list_actors(at, filters=[("job_id", "=", job), ("state", "=", "PENDING_CREATION")], detail=True),
    ]
    single = [_counted(each.required_resources or {}) for each in waiting]
    return [demand for demand in demands if demand.shape in (bundles if demand.together else single)]


def _counted(shape: Shape) -> dict[str, float]:
    """Without what Ray adds by itself to tie a bundle to its group or a task to a node."""
    return {name: value for name, value in shape.items() if value and "_group_" not in name and "node:" not in name}


def _identity(demand: Demand) -> tuple[Any, ...]:
    return demand.together, *sorted(demand.shape.items())


def _fits(demand: Demand, nodes: tuple[Shape, ...]) -> bool:
    holders = [node for node in nodes if _holds(node, demand.shape)]
    if not demand.together:
        return bool(holders)
    return sum(_times(node, demand.shape) for node in holders) >= demand.count


def _holds(node: Shape, shape: Shape) -> bool:
    return all(node.get(name, 0) >= value for name, value in shape.items())


def _times(node: Shape, shape: Shape) -> float:
    return min((node.get(name, 0) // value for name, value in shape.items()), default=float("inf"))


def _amount(name: str, value: float) -> str:
    if name.endswith("memory"):
        return f"{value / 2**30:.3g} GiB {name.replace('_', ' ')}"
    return f"{value:g} {name}{'s' if name in ('CPU', 'GPU') and value != 1 else ''}"
