import pytest

from speechgpt.training.config import StageSection
from speechgpt.training.schedule import rate_at


def rates(**changes) -> list[float]:
    stage = StageSection(mixture={"text": 1}, steps=10, learning_rate=1.0, **changes)
    return [rate_at(step, stage) for step in range(10)]


def test_linear_warms_up_holds_and_falls():
    assert rates(warmup=0.2, hold=0.5) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_without_hold_decay_begins_after_warm_up():
    assert rates(warmup=0.2) == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_cosine_is_half_way_down_in_the_middle():
    got = rates(schedule="cosine", warmup=0)
    assert got[0] == 1
    assert got[5] == pytest.approx(0.5)
    assert all(after < before for before, after in zip(got, got[1:], strict=False))


def test_constant_stays():
    assert rates(schedule="constant", warmup=0.1) == [1.0] * 10
