"""What is worked on together, and how many replicas a load asks for."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.batching import SOUND_SECONDS, Backlog, Batched
from serve.scaling import ByRequestsAndSound, options
from speechgpt.runtime.config import GatewayDeploymentSection, ServingSection, SoundDeploymentSection


@pytest.fixture(autouse=True)
def _replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """serve.batch asks its replica for this, to warn of it."""
    replica = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=16))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: replica)


def together(seconds: list[float], section: SoundDeploymentSection) -> tuple[list[list[float]], list[float]]:
    """The batches in which clips that come at once are worked on, and what was in hand at the beginning of each."""
    batches: list[list[float]] = []
    in_hand: list[float] = []
    backlog = Backlog()

    async def work(items: list[float]) -> list[float]:
        batches.append(items)
        in_hand.append(backlog.stats()[SOUND_SECONDS])
        return [-item for item in items]

    async def ask() -> list[float]:
        one = Batched(work, lambda item: item, section, backlog)
        return await asyncio.gather(*map(one, seconds))

    assert asyncio.run(ask()) == [-item for item in seconds]
    assert backlog.stats() == {SOUND_SECONDS: pytest.approx(0)}
    return batches, in_hand


def test_a_batch_is_of_so_many_seconds() -> None:
    section = SoundDeploymentSection(batch_seconds=10, batch_wait_seconds=0.05)
    batches, in_hand = together([4.0, 5.0, 3.0, 6.0], section)
    # What did not fit Ray puts behind what else waits.
    assert batches == [[4.0, 5.0], [6.0, 3.0]]
    assert in_hand == [18.0, 9.0]


def test_a_clip_that_is_longer_is_worked_on_alone() -> None:
    batches, _ = together([2.0, 25.0, 2.0], SoundDeploymentSection(batch_seconds=10, batch_wait_seconds=0.05))
    assert sorted(batches) == [[2.0], [2.0], [25.0]]


def test_what_fails_is_in_hand_no_longer() -> None:
    async def work(items: list[float]) -> list[float]:
        raise RuntimeError("no")

    backlog = Backlog()
    one = Batched(work, lambda item: item, SoundDeploymentSection(), backlog)
    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(one(3.0))  # type: ignore[arg-type]
    assert backlog.stats() == {SOUND_SECONDS: 0}


@pytest.mark.parametrize(
    ("requests", "sound", "wanted"),
    [(8, [], 2.0), (1, [10.0, 80.0], 3.0), (40, [10.0], 10.0), (0, [0.0, 0.0], 0.0)],
)
def test_requests_or_sound_whichever_asks_for_more(requests: float, sound: list[float], wanted: float) -> None:
    metrics = {SOUND_SECONDS: dict(enumerate(sound))} if sound else {}
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context: Any = SimpleNamespace(
        current_num_replicas=2, total_num_requests=requests, aggregated_metrics=metrics, config=config
    )
    assert ByRequestsAndSound(30)(context)[0] == pytest.approx(wanted)


def test_only_deployments_of_sound_go_by_it() -> None:
    serving = ServingSection()
    scaling = options(SoundDeploymentSection(target_sound_seconds=7), serving)["autoscaling_config"]
    assert scaling.policy.policy_kwargs == {"target_sound_seconds": 7}
    assert scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert options(GatewayDeploymentSection(), serving)["autoscaling_config"].policy.is_default_policy_function()
