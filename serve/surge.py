"""Whether a service is full, by what it said last: so that a crowd can be refused at the door, at hardly any cost."""

import math
import time
from collections.abc import Callable

_SECONDS = 0.25
"""After a refusal one may try, after as long again two more, then four: a crowd that is let in at once would all be
refused by the gateway, and replicas that are new are found all the same."""
_DOUBLINGS = 40


class Surge:
    """What one of Ray's proxies knows. Where one request was refused for want of room, so would the next ones be, but
    for as many as end, and for a few to see whether there is room again. A refusal by a deployment takes the gateway
    20 ms of a processor, most of them to read what is refused: at ten times the load that a node can serve, refusing
    would be most of what it does, and be late.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused_at = -math.inf
        self._ended = self._tried = 0
        self._retry_after = "1"

    def refusal(self) -> str | None:
        """What the one that comes now is to be told to wait; None where it may try."""
        passed = min((self._clock() - self._refused_at) / _SECONDS, _DOUBLINGS)
        if self._tried >= self._ended + 2 ** int(passed) - 1:
            return self._retry_after
        self._tried += 1
        return None

    def refused(self, retry_after: str | None) -> None:
        """There was no room for a request."""
        self._refused_at, self._retry_after = self._clock(), retry_after or "1"
        self._ended = self._tried = 0

    def ended(self) -> None:
        """A request that had room is done with, so that there is room for another."""
        self._ended += 1
