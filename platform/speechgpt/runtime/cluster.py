"""Joining a Ray cluster, or starting a private one on this machine."""

import json
import logging
import os
from pathlib import Path

from speechgpt.runtime.config import ResourcesSection

_MIN_LOGICAL_CPUS = 4
"""A private cluster claims at least these, so that two training workers and the data tasks that feed them can be placed
on a laptop with two cores; Ray's CPUs only count, they bind nothing."""


def connect(resources: ResourcesSection) -> None:
    """Join the cluster of RAY_ADDRESS (Ray sets it inside a submitted job, too), else start a private local one.

    Does nothing in a process that is connected already. A private cluster ends with its process.
    """
    import ray

    if ray.is_initialized():
        return
    # That a private cluster has a token, as Ray gives it one, is no reason to worry anybody.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    runtime_env = {"env_vars": worker_environment()}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=runtime_env, logging_level=logging.WARNING)
        return
    # "local" by name: plain ray.init() would follow the address file that an unclean end of another cluster leaves.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, _MIN_LOGICAL_CPUS),
        object_store_memory=resources.object_store_bytes or None,
        # On loopback. Ray Train asks it whether a run lives, and waits and complains where there is none.
        include_dashboard=True,
        runtime_env=runtime_env,
        logging_level=logging.WARNING,
    )


def worker_environment() -> dict[str, str]:
    """Environment of the workers. What the driver's environment says already wins; no credential is put here."""
    wanted = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not os.environ.get("RAY_ADDRESS") and not any(Path("/dev").glob("nvidia[0-9]*")):
        # DeepSpeed otherwise probes for accelerators and may take a CUDA build of torch for a CUDA machine.
        wanted["DS_ACCELERATOR"] = "cpu"
    # Ray refuses a driver that sets a variable again which its submitted job has set.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    settled = job.get("runtime_env", {}).get("env_vars", {})
    return {name: os.environ.get(name, value) for name, value in wanted.items() if name not in settled}
