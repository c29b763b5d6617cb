"""Whether every deployment that an answer needs has a replica that is warm."""

import time

from ray import serve
from ray.serve.schema import ReplicaState

from serve import records

_CACHE_SECONDS = 1.0


class Readiness:
    """Reads the Serve controller's own view. A replica is RUNNING only after its constructor, which warms the model.

    Remembered for a second, because the probe needs no key and the controller serves the whole cluster.
    """

    def __init__(self, applications: set[str]) -> None:
        self._applications = applications
        self._seen: tuple[float, list[str]] | None = None

    def missing(self) -> list[str]:
        """Names of the deployments without a running replica, and of applications that are not there. Blocks on the
        controller."""
        if self._seen is None or time.monotonic() - self._seen[0] > _CACHE_SECONDS:
            self._seen = time.monotonic(), self._look()
        return self._seen[1]

    def _look(self) -> list[str]:
        found = serve.status().applications
        missing = sorted(self._applications - {application for application, _ in records.deployments()})
        for application in sorted(self._applications & set(found)):
            for name, deployment in found[application].deployments.items():
                if not deployment.replica_states.get(ReplicaState.RUNNING):
                    missing.append(name)
        return missing
