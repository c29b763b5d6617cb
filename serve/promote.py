"""`speechgpt promote` where a service runs: the bundle takes the place of the one that is served, under load."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from serve.promotion import Alias, Promotion, PromotionError
from serve.switch import Target
from serve.verdict import Terms

if TYPE_CHECKING:
    from serve.rollout import ServedCluster

__all__ = ["Terms", "abort", "has_service", "join", "roll_out", "state"]


def join(address: str) -> None:
    """Join the Ray cluster at `host:port`. Raises PromotionError."""
    import logging

    import ray

    if address.startswith(("http://", "https://")):
        raise PromotionError(
            f"{address} is a dashboard: name the Ray cluster (head:6379) from within it, or send the job there by "
            "`speechgpt submit promote`"
        )
    if ray.is_initialized():
        return
    try:
        # Without an environment of its own, so that the replicas it deploys get the gateway's.
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PromotionError(f"no Ray cluster at {address}: {error}") from None


def has_service() -> bool:
    """Whether this cluster has a gateway."""
    from serve.records import gateway_application

    return gateway_application() is not None


def roll_out(
    bundle: str,
    tracking_uri: str,
    alias: Alias,
    terms: Terms,
    deploy_seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Check the bundle whole, then exchange it for the one that the cluster's service has. Gives figures.

    Raises PromotionError, BundleError or TrackingError; the old bundle then serves on.
    """
    from serve import app
    from serve.bundles import find, required_signers
    from serve.rollout import alone
    from serve.soundness import broken_tensor
    from speechgpt.runtime import bundle as bundles

    with _stoppable(), alone() as reports:
        cluster = _cluster(reports, deploy_seconds)
        source = find(bundle, tracking_uri, required_signers(cluster.serving))
        directory = bundles.resolve(source.address, source.tracking_uri)
        if broken := broken_tensor(directory):
            raise PromotionError(f"bundle {bundle}: {broken} holds numbers that are not finite")
        cluster.source = source
        new = app.route(source, app.application_name(source))
        promotion = Promotion(cluster, alias, terms, cluster.serving.longest_visit_seconds, say)
        try:
            promoted = promotion.perform(new)
        finally:
            cluster.restate()
        return {"bundle_digest": source.digest, **promoted.told()}


def abort(alias: Alias, say: Callable[[str], None]) -> dict[str, Any]:
    """Take back what a promotion that was killed has left."""
    from serve.rollout import alone

    with alone() as reports:
        cluster = _cluster(reports, 0)
        Promotion(cluster, alias, Terms(), cluster.serving.longest_visit_seconds, say).abort()
        cluster.restate()
        return _told(cluster.target(), cluster.applications())


def state() -> dict[str, Any]:
    """Which bundle serves, which is on trial with what share, and which applications of bundles there are."""
    from ray import serve

    from serve.records import GATEWAY
    from serve.rollout import bundle_applications

    target = serve.get_deployment_handle(GATEWAY, _gateway()).target.remote().result()
    return _told(target, bundle_applications())


def _cluster(reports: Any, deploy_seconds: float) -> "ServedCluster":
    from serve.rollout import ServedCluster

    return ServedCluster(_gateway(), reports, deploy_seconds)


def _gateway() -> str:
    from serve.records import gateway_application

    if gateway := gateway_application():
        return gateway
    raise PromotionError("no service runs on this cluster: `speechgpt serve` starts one")


def _told(target: Target, applications: set[str]) -> dict[str, Any]:
    canary = target["canary"]
    return {
        "model": target["name"],
        "serving": target["serving"]["digest"],
        "canary": canary["digest"] if canary else "",
        "canary_share": target["share"],
        "applications": " ".join(sorted(applications)),
    }


@contextmanager
def _stoppable() -> Iterator[None]:
    """Told to stop, a promotion goes back before it ends."""

    def stop(*_: Any) -> NoReturn:
        # Not a second time, while it goes back.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise PromotionError("told to stop")

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
