"""What one request or session is known to be and to have cost, for its key's quotas and the audit log; no content."""

import json
import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

audit_log = logging.getLogger("ray.serve.audit")
"""One line of JSON for each visit. Serve writes it into the gateway replica's log."""


async def _no_limit() -> None:
    """For visits without a key, or with one that has no limits."""


def _no_charge(audio_seconds: float, tokens: int) -> None:
    """The same."""


@dataclass
class Visit:
    """key: id of its API key, None where none is needed. audio_seconds: sound that was heard.

    tokens: of prompts and answers together, as `usage.total_tokens`. stream_until: `time.monotonic()` at which a
    streamed answer ends itself, with words, before the deadline cuts it off.
    turn: to be awaited before each answer of a session that has several; raises ApiError 429 when the key's rate or
    quota is spent. quota: the same before sound is heard that nobody may answer, quotas alone.
    charge: told at once of each use, seconds and tokens.
    bundle: digest of the one that it stays with, "" until it is given one; trial: which is a canary.
    asked, failed: whether it came to the bundle's models, and whether they failed it. worked: seconds they took since
    it last heard a sound.
    """

    kind: str
    request_id: str
    key: str | None = None
    audio_seconds: float = 0.0
    tokens: int = 0
    stream_until: float = math.inf
    turn: Callable[[], Awaitable[None]] = _no_limit
    quota: Callable[[], Awaitable[None]] = _no_limit
    charge: Callable[[float, int], None] = _no_charge
    bundle: str = ""
    trial: bool = False
    asked: bool = False
    failed: bool = False
    worked: float = 0.0

    def heard(self, seconds: float) -> None:
        self.audio_seconds += seconds
        self.charge(seconds, 0)

    def spent(self, tokens: int) -> None:
        self.tokens += tokens
        self.charge(0.0, tokens)

    def audited(self, route: str, status: int, seconds: float) -> dict[str, Any]:
        """route: its template, never the path itself, in which anything may stand. status: 0 for a client that left
        before it was answered."""
        return {
            "audit": self.kind,
            "request_id": self.request_id,
            "key": self.key,
            "route": route,
            "status": status,
            "seconds": round(seconds, 3),
            "audio_seconds": round(self.audio_seconds, 3),
            "tokens": self.tokens,
        }


_current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def begin(visit: Visit) -> None:
    """Make it `current` for this task and those that it starts."""
    _current.set(visit)


def current() -> Visit:
    """The visit on whose behalf this code runs; one that nobody looks at where there is none."""
    return _current.get() or Visit("none", "")


def write_down(line: dict[str, Any]) -> None:
    audit_log.info(json.dumps(line))
