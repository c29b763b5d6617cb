import pytest
import torch

from speechgpt.training import engine, pace
from speechgpt.training.config import EngineSection


@pytest.fixture(autouse=True)
def process_group():
    engine.join(EngineSection(workers=1))


def looks(monkeypatch, seconds_a_step, steps: int) -> list[int]:
    """The steps after which it was due, every two seconds, on a clock that a step moves by so much."""
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    due, every = [], pace.Pace(2.0, torch.device("cpu"))
    for finished in range(1, steps + 1):
        now += seconds_a_step(finished)
        if every.due(finished):
            due.append(finished)
    return due


def test_slow_steps_are_looked_at_each(monkeypatch):
    assert looks(monkeypatch, lambda step: 5.0, 6) == [1, 2, 3, 4, 5, 6]


def test_fast_steps_are_looked_at_every_so_many_seconds_once_their_speed_is_known(monkeypatch):
    due = looks(monkeypatch, lambda step: 0.0625, 200)
    assert due[:6] == [1, 2, 4, 8, 16, 32]
    assert {later - earlier for earlier, later in zip(due[6:], due[7:], strict=False)} == {32}


def test_steps_that_become_slow_are_looked_at_more_often(monkeypatch):
    due = looks(monkeypatch, lambda step: 0.0625 if step < 100 else 4.0, 140)
    late = [step for step in due if step > 100]
    assert late[1:] == list(range(late[0] + 1, 141))
