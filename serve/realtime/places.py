"""How many sessions one gateway replica holds, and what becomes of them when it goes away."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from serve import records
from serve.errors import ApiError, described
from serve.meters import Meters

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationDetails

logger = logging.getLogger("ray.serve")
LOOK_SECONDS = 2.0
"""How often a replica with sessions looks whether it is to go."""


class Leaver(Protocol):
    def leave(self) -> None:
        """The replica goes away: end when what is being said is answered."""
        ...


class Places:
    """going_away: whether Serve has told this replica to stop; blocks."""

    def __init__(self, most: int, retry_after: float, meters: Meters, going_away: Callable[[], bool]) -> None:
        self.meters = meters
        self._most = most
        self._retry_after = retry_after
        self._going_away = going_away
        self._sessions: set[Leaver] = set()
        self._entered = 0
        self._leaving = False
        self._watch: asyncio.Task[None] | None = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one session. Raises ApiError 503, worth a retry."""
        if self._leaving:
            raise self._refused("replaced", "This part of the service is being replaced; connect again.")
        if self._entered >= self._most:
            raise self._refused("sessions_full", "No room for another session; try again shortly.")
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextmanager
    def told(self, session: Leaver) -> Iterator[None]:
        """While this lasts, the session hears when the replica goes."""
        self._sessions.add(session)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        if self._leaving:
            session.leave()
        try:
            yield
        finally:
            self._sessions.discard(session)
            if not self._sessions and self._watch:
                self._watch.cancel()

    async def _look(self) -> None:
        while not self._leaving:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._leaving = await asyncio.to_thread(self._going_away)
            except Exception as error:  # noqa: BLE001 - a controller that is restarted answers next time
                logger.warning("whether this replica is to go could not be read: %s", described(error))
        for session in list(self._sessions):
            session.leave()

    def _refused(self, code: str, message: str) -> ApiError:
        self.meters.rejected(code)
        return ApiError(503, message, code=code, retry_after=self._retry_after)

    def _count(self, change: int) -> None:
        self._entered += change
        self.meters.active(self._entered)


def told_to_stop() -> bool:
    """Whether the Serve controller is ending the replica in which this runs: it says so to nobody but the controller's
    own records, which are what `serve status` shows. Blocks."""
    from ray import serve
    from ray.serve.schema import ServeInstanceDetails

    mine = serve.get_replica_context()
    details = ServeInstanceDetails(**records.details())
    return is_ending(details.applications.get(mine.app_name), mine.deployment, mine.replica_tag)


def is_ending(application: "ApplicationDetails | None", deployment: str, replica: str) -> bool:
    """Whether the records of an application say that a replica is to go. One that they do not know stays: a controller
    that has just come back may not know it yet."""
    from ray.serve.schema import ApplicationStatus, ReplicaState

    if application is None:
        return False
    if application.status == ApplicationStatus.DELETING:
        # Its replicas are still there, but their records are not.
        return True
    known = application.deployments.get(deployment)
    return known is not None and any(
        each.replica_id == replica and each.state == ReplicaState.STOPPING for each in known.replicas
    )
