"""A promotion on Ray Serve: applications come and go, the gateway's `user_config` changes, its replicas report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus, ReplicaState

from serve import app, records
from serve.bundles import ENCODER, LANGUAGE_MODEL, VOCODER, Source
from serve.gateway import Settings
from serve.promotion import PromotionError
from serve.records import GATEWAY
from serve.reports import ACTOR, Reports
from serve.shared import NAMESPACE
from serve.switch import Route, Target
from serve.tally import Figures
from speechgpt.runtime.config import ServingSection

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 20.0
"""Within which Ray has forgotten a promotion that was killed."""
_TURN_SECONDS = 300.0
"""Within which every gateway replica must go by a new target."""


def bundle_applications() -> set[str]:
    """Those of this cluster, whether the gateway knows them or not."""
    return {name for name in serve.status().applications if name.startswith(app.BUNDLES)}


@contextmanager
def alone() -> Iterator[Any]:
    """The actor that replicas report to; it ends with this process. Raises PromotionError if there is one already."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            # num_cpus=0: a full cluster must not keep it waiting.
            actor: Any = ray.remote(Reports).options(name=ACTOR, namespace=NAMESPACE, num_cpus=0).remote()
            break
        except ValueError:
            if time.monotonic() > until:
                raise PromotionError("another promotion is under way on this cluster: let it end, or stop it") from None
            time.sleep(_LOOK_SECONDS)
    try:
        ray.get(actor.expect.remote(""))
        yield actor
    finally:
        ray.kill(actor)


class ServedCluster:
    def __init__(self, gateway: str, reports: Any, deploy_seconds: float) -> None:
        """gateway: its application. deploy_seconds: within which a bundle must be warm. Raises PromotionError for a
        service whose bundle cannot be exchanged."""
        self._name = gateway
        self._gateway = serve.get_deployment_handle(GATEWAY, gateway)
        self._reports = reports
        self._deploy_seconds = deploy_seconds
        self.settings: Settings = self._gateway.settings.remote().result()
        self._runtime_env = _runtime_env(gateway)
        target = self.target()
        if not target["serving"]["application"]:
            raise PromotionError(
                f"the application {gateway} has gateway and bundle in one, as `serve.app:build` makes it; start the "
                "service by `speechgpt serve` or from a rendered config to exchange its bundle while it runs"
            )
        self._stated = target.get("stated")
        self.source: Source | None = None

    @property
    def serving(self) -> ServingSection:
        return self.settings.serving

    def target(self) -> Target:
        return self._gateway.target.remote().result()

    def turn(self, target: Target) -> None:
        # Before the replicas hear of it, so that no report comes too early.
        ray.get(self._reports.expect.remote(target["watch"]))
        if self._stated:
            target = {**target, "stated": self._stated}
        gateway = app.same_gateway(self.settings, self._runtime_env, target)
        serve.run(gateway, name=self._name, route_prefix="/")
        until = time.monotonic() + _TURN_SECONDS
        while target["watch"] and not self._all_report():
            if time.monotonic() > until:
                raise PromotionError(f"not every replica of {self._name} went by its new user_config")
            time.sleep(_LOOK_SECONDS)

    def applications(self) -> set[str]:
        return bundle_applications()

    def deploy(self, route: Route) -> None:
        if self.source is None or self.source.digest != route["digest"]:
            raise ValueError(f"{route['application']} is not the bundle that was checked")
        name = route["application"]
        # What a promotion that was killed has left comes up by itself; deployed once more, all its replicas would be
        # replaced, for which a full cluster has no room.
        left = serve.status().applications.get(name)
        if left is None or left.status not in (ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING):
            bundle = app.bundle_application(self.source, self.serving, self._runtime_env, self._wanted())
            serve.run_many([RunTarget(bundle, name, route_prefix=None)], wait_for_applications_running=False)
        until = time.monotonic() + self._deploy_seconds
        while (status := serve.status().applications[name]).status != ApplicationStatus.RUNNING:
            if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise PromotionError(f"the bundle does not come up: {_cause(status)}")
            if time.monotonic() > until:
                raise PromotionError(f"the bundle was not warm in {self._deploy_seconds:g} s: {_cause(status)}")
            time.sleep(_LOOK_SECONDS)

    def remove(self, application: str) -> None:
        # It is ordered then, and goes on by itself.
        with suppress(TimeoutError):
            serve.delete(application)

    def restate(self) -> None:
        """After the last turn. Of a config file that the service was deployed from, Serve keeps what is still there.

        What a promotion does to such a service, it does beside that file. Serve would take up the file by itself when
        its controller is started anew, and KubeRay when it finds nothing of it left: now the gateway belongs to it
        again, as it is, and a bundle that is gone does not any more."""
        stated, found = records.stated(), serve.status().applications
        if self._name not in stated:
            return
        there = {name for name, status in found.items() if status.status != ApplicationStatus.DELETING}
        records.state([config for name, config in stated.items() if name in there])
        until = time.monotonic() + _TURN_SECONDS
        while serve.status().applications[self._name].status != ApplicationStatus.RUNNING:
            if time.monotonic() > until:
                raise PromotionError(f"{self._name} serves on, but Serve could not build it again: see `serve status`")
            time.sleep(_LOOK_SECONDS)

    def figures(self) -> dict[str, Figures]:
        until = time.monotonic() + _TURN_SECONDS
        while not self._all_report() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        return ray.get(self._reports.figures.remote())

    def _all_report(self) -> bool:
        return len(ray.get(self._reports.replicas.remote())) >= max(1, self._running(self._name, GATEWAY))

    def _wanted(self) -> Callable[[str], int]:
        """How many replicas each part of the new bundle begins with: those that the old one's has, because it is to
        take over all its work at once."""
        serving = self.target()["serving"]["application"]
        counts = {part: self._running(serving, part) for part in (ENCODER, LANGUAGE_MODEL, VOCODER)}
        return lambda part: counts[part]

    def _running(self, application: str, deployment: str) -> int:
        found = serve.status().applications.get(application)
        if found is None or deployment not in found.deployments:
            return 0
        return found.deployments[deployment].replica_states.get(ReplicaState.RUNNING, 0)


def _runtime_env(gateway: str) -> dict[str, Any]:
    """As the gateway's deployment asked for it; that of its replicas holds the controller's as well."""
    deployed = records.details()["applications"][gateway]["deployments"][GATEWAY]["deployment_config"]
    return deployed["ray_actor_options"].get("runtime_env") or {}


def _cause(status: Any) -> str:
    """What a failed application's deployments say, at most two lines each: the first, and the exception."""
    told = [deployment.message for deployment in status.deployments.values() if deployment.message]
    causes = []
    for message in told or [status.message]:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raised = [line for line in lines if "Error" in line.split(" ")[0]]
        causes.append(" ".join(dict.fromkeys((lines[:1] + raised[-1:]) if lines else ["no reason given"])))
    return "; ".join(causes)
