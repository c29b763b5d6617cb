"""A class as a Ray Serve deployment, by a recipe's section."""

from typing import Any

from ray import serve
from ray.serve import Deployment
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, BackpressureConfig

from serve.batching import SOUND_SECONDS
from speechgpt.runtime.config import DeploymentSection, ServingSection, SoundDeploymentSection


class ByRequestsAndSound:
    """Ray Serve's own policy by requests, and replicas for the sound that they have in hand: the larger number.

    Ray applies bounds and delays to what it says.
    """

    def __init__(self, target_sound_seconds: float) -> None:
        """target_sound_seconds: for one replica."""
        self._target = target_sound_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        wanted, state = replica_queue_length_autoscaling_policy(context)
        seconds = sum((context.aggregated_metrics or {}).get(SOUND_SECONDS, {}).values())
        return max(wanted, seconds / self._target), state


def deployment(
    cls: type,
    name: str,
    section: DeploymentSection,
    serving: ServingSection,
    runtime_env: dict[str, Any] | None = None,
    replicas: int = 0,
) -> Deployment:
    return serve.deployment(name=name, **options(section, serving, runtime_env, replicas))(cls)


def options(
    section: DeploymentSection,
    serving: ServingSection,
    runtime_env: dict[str, Any] | None = None,
    replicas: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of `serve.deployment`. replicas: to begin with, as far as the section lets."""
    resources: dict[str, Any] = {"num_cpus": section.cpus}
    if section.gpus:
        resources["num_gpus"] = section.gpus
    if runtime_env:
        resources["runtime_env"] = runtime_env
    return {
        "ray_actor_options": resources,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=section.min_replicas,
            max_replicas=section.max_replicas,
            initial_replicas=min(max(replicas, section.min_replicas), section.max_replicas) if replicas else None,
            target_ongoing_requests=section.target_ongoing_requests,
            upscale_delay_s=section.upscale_delay_seconds,
            downscale_delay_s=section.downscale_delay_seconds,
            policy=_policy(section),
        ),
        "max_ongoing_requests": section.max_ongoing_requests,
        "max_queued_requests": section.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=serving.retry_after_seconds),
        # A replica that goes away finishes what it has begun.
        "graceful_shutdown_timeout_s": serving.request_timeout_seconds,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        # A rolling update brings the new replica up before the old one stops.
        "max_surge_percent": 100,
    }


def _policy(section: DeploymentSection) -> AutoscalingPolicy:
    if not isinstance(section, SoundDeploymentSection):
        return AutoscalingPolicy()
    return AutoscalingPolicy(
        policy_function=ByRequestsAndSound, policy_kwargs={"target_sound_seconds": section.target_sound_seconds}
    )
