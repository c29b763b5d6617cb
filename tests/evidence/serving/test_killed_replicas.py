"""Row 8 of the matrix: a replica that is killed takes its own requests with it, and no other."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_service import DEPLOYMENTS, LiveService, live_service, replicas_of
from load import Answer, Load, chat, closed_loop, speech, transcription, written_down

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

CLIENTS = 8
LONGEST = 180.0


def test_a_killed_replica_takes_only_its_own_requests(
    tiny_bundle: Path, tiny: Recipe, ray_cluster: None, clip: bytes, record_property: Callable[[str, object], None]
) -> None:
    """One of two replicas of each deployment killed under load: its requests alone fail, as ones to be tried again."""
    asks = [chat("tiny"), chat("tiny", spoken=True, stream=True), speech("tiny"), transcription("tiny", clip)]
    two = replicas_of(tiny, 2, cpus=0.2, max_queued_requests=64)
    with live_service(tiny_bundle, tiny, **two) as service:
        for deployment in ("LanguageModel", "Vocoder", "Encoder", "Gateway"):
            kill = Kill(service, deployment)
            answers = asyncio.run(
                closed_loop(service.url, asks, CLIENTS, lambda kill=kill: not kill.over, LONGEST, kill.run)
            )
            failed = [answer for answer in answers if not answer.good]
            record_property(f"{deployment}: requests in its hands", kill.in_hand)
            record_property(f"{deployment}: answers", written_down(answers))
            record_property(f"{deployment}: failed", [f"{answer.status} {answer.said[:90]}" for answer in failed])
            record_property(f"{deployment}: seconds until there were two again", kill.seconds)
            assert kill.seconds is not None, f"{deployment} did not come back"
            assert len(failed) <= kill.in_hand, failed
            for answer in failed:
                assert answer.began <= kill.at <= answer.ended, f"it was not in flight: {answer}"
                assert answer.retryable or answer.broken, f"not to be tried again: {answer}"
            after = [answer for answer in answers if answer.began > kill.at]
            assert after and all(answer.good for answer in after)


class Kill:
    """Waits for load, kills a replica that has something in hand, and waits until there are two again."""

    def __init__(self, service: LiveService, deployment: str) -> None:
        assert deployment in DEPLOYMENTS
        self._service, self._deployment = service, deployment
        self.over = False
        self.at = 0.0
        self.in_hand = 0
        self.seconds: float | None = None

    async def run(self, load: Load) -> None:
        try:
            while sum(answer.good for answer in load.answers) < 2 * CLIENTS:
                await asyncio.sleep(0.1)
            await asyncio.to_thread(self._kill)
            deadline = time.monotonic() + LONGEST
            while time.monotonic() < deadline and self.seconds is None:
                found = await asyncio.to_thread(self._service.replicas, self._deployment)
                if len(found) == 2 and self._killed not in [replica.pid for replica in found]:
                    self.seconds = round(time.monotonic() - self.at, 1)
                await asyncio.sleep(0.5)
            enough: list[Answer] = []
            while len(enough) < 2 * CLIENTS and time.monotonic() < deadline + LONGEST:
                enough = [answer for answer in load.answers if answer.began > self.at]
                await asyncio.sleep(0.1)
        finally:
            self.over = True

    def _kill(self) -> None:
        replicas = self._service.replicas(self._deployment)
        assert len(replicas) == 2
        for _ in range(2000):
            for replica in replicas:
                if in_hand := replica.ongoing():
                    self._killed = replica.pid
                    self.at = time.monotonic()
                    os.kill(replica.pid, signal.SIGKILL)
                    # Between the look and the kill two more may have come.
                    self.in_hand = in_hand + 2
                    return
        raise AssertionError(f"{self._deployment} has nothing to do")
