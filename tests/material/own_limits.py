"""Limits of keys without a cluster."""

from serve.keys import Allowance
from serve.limits import Lease, Limits, Refusal


class OwnLimits:
    """The real counts, in this process rather than in an actor."""

    def __init__(self) -> None:
        self._limits = Limits()

    async def enter(self, key: str, allowance: Allowance, seconds: float) -> Lease | Refusal:
        return self._limits.enter(key, allowance, seconds)

    async def count(self, key: str, allowance: Allowance) -> Refusal | None:
        return self._limits.count(key, allowance)

    async def spent(self, key: str, allowance: Allowance) -> Refusal | None:
        return self._limits.spent(key, allowance)

    def charge(self, key: str, audio_seconds: float, tokens: int) -> None:
        self._limits.charge(key, audio_seconds, tokens)

    def renew(self, key: str, lease: Lease, seconds: float) -> None:
        self._limits.renew(key, lease, seconds)

    def leave(self, key: str, lease: Lease) -> None:
        self._limits.leave(key, lease)
