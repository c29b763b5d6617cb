"""Rates and quotas of API keys, counted in one place for all replicas of the gateway."""

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve.errors import ApiError
from serve.keys import Allowance
from serve.shared import shared, started, told

ACTOR = "speechgpt-limits"
DAY = 86_400

Limit = Literal["requests_per_minute", "concurrent_requests", "audio_seconds_per_day", "tokens_per_day"]


@dataclass(frozen=True)
class Refusal:
    """Which limit is reached, and in how many seconds it is not any more."""

    limit: Limit
    retry_after: float

    def told(self, allowance: Allowance) -> ApiError:
        words = self.limit.replace("_", " ")
        code = "insufficient_quota" if self.limit.endswith("_per_day") else "rate_limit_exceeded"
        return ApiError(
            429,
            f"This API key has reached its limit of {getattr(allowance, self.limit):g} {words}.",
            code=code,
            retry_after=self.retry_after,
        )


@dataclass(frozen=True)
class Lease:
    """One of a key's places for requests under way; it is free again when released, or at its end."""

    id: str


@dataclass
class _Use:
    """What one key has used. level: requests that the bucket holds at `filled_at`, None before the key had a rate.
    leases: their ends, by id."""

    level: float | None = None
    filled_at: float = 0.0
    day: int = 0
    audio_seconds: float = 0.0
    tokens: int = 0
    leases: dict[str, float] = field(default_factory=dict)


class Limits:
    """Token buckets for requests, daily counters for quotas, leases for what is under way.

    A request is refused once a quota is spent; the one that spends it is finished. Times are Unix seconds. Everything
    here is in memory: a restart begins new days and full buckets.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def enter(self, key: str, allowance: Allowance, seconds: float) -> Lease | Refusal:
        """Count a request, and give it a place for `seconds`."""
        now = self._clock()
        use = self._use(key, allowance, now)
        use.leases = {id: end for id, end in use.leases.items() if end > now}
        if allowance.concurrent_requests is not None and len(use.leases) >= allowance.concurrent_requests:
            return Refusal("concurrent_requests", 1)
        if refusal := self.count(key, allowance):
            return refusal
        lease = Lease(uuid.uuid4().hex)
        use.leases[lease.id] = now + seconds
        return lease

    def count(self, key: str, allowance: Allowance) -> Refusal | None:
        """Count a request that needs no place of its own: an answer within a session."""
        if refusal := self.spent(key, allowance):
            return refusal
        use = self._use(key, allowance, self._clock())
        if allowance.requests_per_minute is not None:
            level = use.level or 0.0
            if level < 1:
                return Refusal("requests_per_minute", (1 - level) * 60 / allowance.requests_per_minute)
            use.level = level - 1
        return None

    def spent(self, key: str, allowance: Allowance) -> Refusal | None:
        """A quota that is; nothing is counted."""
        now = self._clock()
        use = self._use(key, allowance, now)
        quotas: tuple[tuple[Limit, float | None, float], ...] = (
            ("audio_seconds_per_day", allowance.audio_seconds_per_day, use.audio_seconds),
            ("tokens_per_day", allowance.tokens_per_day, use.tokens),
        )
        for limit, most, used in quotas:
            if most is not None and used >= most:
                return Refusal(limit, (use.day + 1) * DAY - now)
        return None

    def charge(self, key: str, audio_seconds: float, tokens: int) -> None:
        use = self._use(key, Allowance(), self._clock())
        use.audio_seconds += audio_seconds
        use.tokens += tokens

    def renew(self, key: str, lease: Lease, seconds: float) -> None:
        use = self._use(key, Allowance(), self._clock())
        use.leases[lease.id] = self._clock() + seconds

    def leave(self, key: str, lease: Lease) -> None:
        if use := self._uses.get(key):
            use.leases.pop(lease.id, None)

    def _use(self, key: str, allowance: Allowance, now: float) -> _Use:
        most = allowance.requests_per_minute
        use = self._uses.setdefault(key, _Use())
        if most is not None:
            # A clock that was set back must not empty the bucket.
            passed = max(0.0, now - use.filled_at)
            level = most if use.level is None else use.level + passed * most / 60
            use.level, use.filled_at = min(most, level), now
        day = math.floor(now / DAY)
        if day != use.day:
            use.day, use.audio_seconds, use.tokens = day, 0.0, 0
        return use


class Counting(Protocol):
    """Limits as the gateway uses them, wherever they live. `charge`, `renew` and `leave` do not wait."""

    async def enter(self, key: str, allowance: Allowance, seconds: float) -> Lease | Refusal: ...

    async def count(self, key: str, allowance: Allowance) -> Refusal | None: ...

    async def spent(self, key: str, allowance: Allowance) -> Refusal | None: ...

    def charge(self, key: str, audio_seconds: float, tokens: int) -> None: ...

    def renew(self, key: str, lease: Lease, seconds: float) -> None: ...

    def leave(self, key: str, lease: Lease) -> None: ...


class SharedLimits:
    """The one Limits of the cluster (`shared`).

    Without it nobody with a limit is let in: `enter`, `count` and `spent` raise ApiError 503, worth a retry.
    """

    def __init__(self) -> None:
        self._actor = shared(Limits, ACTOR)

    async def started(self) -> None:
        await started(self._actor)

    async def enter(self, key: str, allowance: Allowance, seconds: float) -> Lease | Refusal:
        return await told(self._actor.enter.remote(key, allowance, seconds), "count requests")

    async def count(self, key: str, allowance: Allowance) -> Refusal | None:
        return await told(self._actor.count.remote(key, allowance), "count requests")

    async def spent(self, key: str, allowance: Allowance) -> Refusal | None:
        return await told(self._actor.spent.remote(key, allowance), "look at quotas")

    def charge(self, key: str, audio_seconds: float, tokens: int) -> None:
        self._actor.charge.remote(key, audio_seconds, tokens)

    def renew(self, key: str, lease: Lease, seconds: float) -> None:
        self._actor.renew.remote(key, lease, seconds)

    def leave(self, key: str, lease: Lease) -> None:
        self._actor.leave.remote(key, lease)
