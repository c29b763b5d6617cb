"""Spoken answers are found again until their time is up."""

from serve.memory import Exchange, Memory

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
