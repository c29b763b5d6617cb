"""Whether a service is full, by what it said last: so that a crowd can be refused at the door, at hardly any cost."""

import time
from collections.abc import Callable

_SECONDS = 0.25
"""How long a refusal holds for those who come after it: replicas that are new, or end what another proxy sent them,
are found after so long."""


class Surge:
    """What one of Ray's proxies knows. Where one request was refused for want of room, so would the next ones be, until
    one that had room ends: then one more may try. A refusal by a deployment takes the gateway 20 ms of a processor,
    most of them to read what is refused: at ten times the load that a node can serve, refusing would be most of what
    it does, and be late.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self._freed = 0
        self._retry_after = "1"

    def refusal(self) -> str | None:
        """What the one that comes now is to be told to wait; None where it may try."""
        if self._clock() >= self._until:
            return None
        if self._freed:
            self._freed -= 1
            return None
        return self._retry_after

    def refused(self, retry_after: str | None) -> None:
        """There was no room for a request."""
        self._until, self._retry_after, self._freed = self._clock() + _SECONDS, retry_after or "1", 0

    def ended(self) -> None:
        """A request that had room is done with, so that there is room for another."""
        self._freed += 1
