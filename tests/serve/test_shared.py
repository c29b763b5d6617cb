"""What the gateway's replicas share lives as long as there is one of them, on a real cluster."""

import time

import pytest
import ray

from serve.shared import NAMESPACE, shared

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Tally:
    """A class like Limits and Memory."""

    def __init__(self, first: int) -> None:
        self._count = first

    def count(self, by: int = 1) -> int:
        self._count += by
        return self._count


@ray.remote(num_cpus=0)
def slow() -> int:
    time.sleep(5)
    return 1


@ray.remote(num_cpus=0)
class Replica:
    pass


def lives() -> bool:
    try:
        ray.get_actor("tally", NAMESPACE)
    except ValueError:
        return False
    return True


def gone_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lives() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not lives()


def test_it_is_one_and_ends_after_the_last_replica(ray_cluster: None) -> None:
    replicas = [
        Replica.options(name=f"SERVE_REPLICA::gateway#Gateway#{n}", namespace="serve", lifetime="detached").remote()
        for n in range(2)
    ]
    first, second = (shared(Tally, "tally", 5, check_seconds=0.5) for _ in range(2))
    assert ray.get(first.count.remote()) == 6 and ray.get(second.count.remote()) == 7
    ray.kill(replicas[0])
    time.sleep(4)
    assert lives() and ray.get(first.count.remote()) == 8, "as long as there is a replica"
    ray.kill(replicas[1])
    time.sleep(1)
    assert lives(), "an update may leave none for a while"
    assert gone_within(30), "it holds its node for nothing"
    # The next service begins anew.
    assert ray.get(shared(Tally, "tally", 5, check_seconds=0.5).count.remote()) == 6
    assert gone_within(30), "it holds its node for nothing"


def test_no_call_waits_for_one_that_was_cancelled_on_its_way(ray_cluster: None) -> None:
    """Serve cancels what a client who went away has waited for, and with it the calls that were made for it."""
    tally = shared(Tally, "waited for", 0)
    assert ray.get(tally.count.remote()) == 1
    cancelled = tally.count.remote(slow.remote())
    ray.cancel(cancelled)
    assert ray.get(tally.count.remote(), timeout=10) == 2
    ray.kill(tally)
