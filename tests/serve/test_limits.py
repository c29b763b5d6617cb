"""Row 6 of the matrix, where it is counted: rates, quotas and places of a key, against a clock of the test's own."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.keys import Allowance
from serve.limits import ACTOR, DAY, Lease, Limits, Refusal, SharedLimits
from serve.shared import NAMESPACE

NOON = 20_000 * DAY + DAY / 2


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 20), st.lists(st.floats(0, 30), max_size=60))
def test_never_more_than_the_rate(rate: int, waits: list[float]) -> None:
    clock, allowance = Clock(), Allowance(requests_per_minute=rate)
    limits, passed = Limits(clock), []
    for wait in waits:
        clock.now += wait
        if limits.count("k", allowance) is None:
            passed.append(clock.now)
    for start in passed:
        # A full bucket and what comes back in a minute.
        assert sum(start <= moment < start + 60 for moment in passed) <= 2 * rate
    assert len(passed) <= rate + rate * (clock.now - NOON) / 60 + 1e-6


def test_who_waits_as_told_is_let_in() -> None:
    clock, allowance = Clock(), Allowance(requests_per_minute=7)
    limits = Limits(clock)
    refused = 0
    for _ in range(50):
        refusal = limits.count("k", allowance)
        if refusal:
            refused += 1
            clock.now += refusal.retry_after + 1e-6
            assert limits.count("k", allowance) is None
    assert refused > 40


def test_keys_do_not_share() -> None:
    limits, one = Limits(Clock()), Allowance(requests_per_minute=1)
    assert limits.count("a", one) is None and limits.count("a", one) is not None
    assert limits.count("b", one) is None
    assert limits.count("a", Allowance()) is None


@pytest.mark.parametrize(
    ("allowance", "charge", "limit"),
    [
        (Allowance(tokens_per_day=100), (0.0, 60), "tokens_per_day"),
        (Allowance(audio_seconds_per_day=10), (6.0, 0), "audio_seconds_per_day"),
    ],
)
def test_a_quota_lasts_until_midnight(allowance: Allowance, charge: tuple[float, int], limit: str) -> None:
    clock = Clock()
    limits = Limits(clock)
    for _ in range(2):
        assert limits.count("k", allowance) is None
        limits.charge("k", *charge)
    refusal = limits.count("k", allowance)
    assert refusal == Refusal(limit, DAY / 2)  # type: ignore[arg-type]
    told = refusal.told(allowance)
    assert (told.status, told.code) == (429, "insufficient_quota")
    clock.now += DAY / 2
    assert limits.count("k", allowance) is None


def test_places_are_given_back_or_run_out() -> None:
    clock, allowance = Clock(), Allowance(concurrent_requests=2, requests_per_minute=100)
    limits = Limits(clock)
    first, second = limits.enter("k", allowance, 10), limits.enter("k", allowance, 10)
    assert isinstance(first, Lease) and isinstance(second, Lease)
    assert limits.enter("k", allowance, 10) == Refusal("concurrent_requests", 1)
    limits.leave("k", first)
    assert isinstance(limits.enter("k", allowance, 10), Lease)
    clock.now += 9
    limits.renew("k", second, 10)
    clock.now += 2
    # What its replica never gave back is over, what was renewed is not.
    assert isinstance(limits.enter("k", allowance, 10), Lease)
    assert limits.enter("k", allowance, 10) == Refusal("concurrent_requests", 1)


def test_a_refused_request_costs_no_place() -> None:
    clock, allowance = Clock(), Allowance(concurrent_requests=1, requests_per_minute=1)
    limits = Limits(clock)
    entered = limits.enter("k", allowance, 10)
    assert isinstance(entered, Lease)
    limits.leave("k", entered)
    assert limits.enter("k", allowance, 10) == Refusal("requests_per_minute", 60)
    clock.now += 61
    assert isinstance(limits.enter("k", allowance, 10), Lease)


def test_a_clock_that_goes_back_takes_nothing() -> None:
    clock, allowance = Clock(), Allowance(requests_per_minute=2)
    limits = Limits(clock)
    assert limits.count("k", allowance) is None
    clock.now -= 3600
    assert limits.count("k", allowance) is None


@pytest.mark.ray
def test_replicas_count_together(ray_cluster: None) -> None:
    """Two processes, as two replicas of the gateway: what one has let in, the other refuses."""
    import ray

    @ray.remote(num_cpus=0)
    class Replica:
        def __init__(self) -> None:
            self.limits = SharedLimits()

        async def enter(self, key: str, allowance: Allowance) -> Lease | Refusal:
            await self.limits.started()
            return await self.limits.enter(key, allowance, 60)

        async def charge(self, key: str, tokens: int) -> None:
            self.limits.charge(key, 0, tokens)

        async def leave(self, key: str, lease: Lease) -> None:
            self.limits.leave(key, lease)

    replicas = [Replica.remote() for _ in range(2)]  # type: ignore[attr-defined]
    try:
        rate = Allowance(requests_per_minute=3)
        entered = [ray.get(replicas[turn % 2].enter.remote("rate", rate)) for turn in range(5)]
        assert [isinstance(each, Lease) for each in entered] == [True, True, True, False, False]
        assert entered[3].limit == "requests_per_minute" and 0 < entered[3].retry_after <= 20

        one = Allowance(concurrent_requests=1)
        lease = ray.get(replicas[0].enter.remote("places", one))
        assert ray.get(replicas[1].enter.remote("places", one)) == Refusal("concurrent_requests", 1)
        ray.get(replicas[0].leave.remote("places", lease))
        assert isinstance(_until_let_in(replicas[1], "places", one), Lease)

        quota = Allowance(tokens_per_day=10)
        ray.get(replicas[0].charge.remote("quota", 10))
        refused = ray.get(replicas[1].enter.remote("quota", quota))
        assert isinstance(refused, Refusal) and refused.limit == "tokens_per_day"
    finally:
        for actor in (*replicas, ray.get_actor(ACTOR, NAMESPACE)):
            ray.kill(actor)


def _until_let_in(replica: Any, key: str, allowance: Allowance) -> Any:
    """`leave` does not wait, so a place may be free a moment later."""
    import ray

    for _ in range(50):
        if isinstance(entered := ray.get(replica.enter.remote(key, allowance)), Lease):
            return entered
        time.sleep(0.1)
    return entered
