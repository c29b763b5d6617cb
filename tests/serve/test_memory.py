"""Spoken answers are found again until their time is up."""

import asyncio

import pytest
from ray.exceptions import ActorUnavailableError

from serve.errors import ApiError
from serve.memory import Exchange, Memory, SharedMemory

FIVE = Exchange("two plus three", "five")


def test_an_answer_is_remembered_until_it_expires() -> None:
    now = 100.0
    memory = Memory(ttl_seconds=10, capacity=5, clock=lambda: now)
    assert memory.keep("audio_1", FIVE) == 110
    now = 109.9
    assert memory.recall("audio_1") == FIVE
    now = 110.0
    assert memory.recall("audio_1") is None


def test_the_oldest_gives_way() -> None:
    memory = Memory(ttl_seconds=10, capacity=2)
    for name in ("a", "b", "c"):
        memory.keep(name, FIVE)
    assert [memory.recall(name) for name in ("a", "b", "c")] == [None, FIVE, FIVE]


def test_unknown_ids_are_nobodys() -> None:
    assert Memory(10, 2).recall("audio_of_somebody_else") is None


class Away:
    """An actor whose call ends so."""

    def __init__(self, end):
        self.keep = self.recall = self
        self._end = end

    def remote(self, *_):
        return self._end()


async def never():
    await asyncio.Event().wait()


async def unavailable():
    raise ActorUnavailableError("its node is gone", None)


async def broken():
    raise KeyError("a defect")


@pytest.mark.parametrize("end", [never, unavailable])
def test_without_the_actor_a_request_is_told_to_come_again(end, monkeypatch):
    monkeypatch.setattr("serve.memory.shared", lambda *_: Away(end))
    monkeypatch.setattr("serve.shared._PATIENCE_SECONDS", 0.05)
    memory = SharedMemory(60, 3)
    for asked in (memory.keep("a", Exchange("q", "a")), memory.recall("a")):
        with pytest.raises(ApiError) as refused:
            asyncio.run(asked)
        assert (refused.value.status, refused.value.retry_after) == (503, 1)


def test_a_defect_of_the_actor_is_not_hidden(monkeypatch):
    monkeypatch.setattr("serve.memory.shared", lambda *_: Away(broken))
    with pytest.raises(KeyError):
        asyncio.run(SharedMemory(60, 3).recall("a"))
