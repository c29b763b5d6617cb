import pytest

from speechgpt.training import elastic
from speechgpt.training.config import EngineSection, StageSection


def stage(micro_batch: int = 2, accumulation: int = 1) -> StageSection:
    return StageSection(
        mixture={"text": 1}, steps=4, micro_batch=micro_batch, accumulation=accumulation, learning_rate=1e-3
    )


def test_the_global_batch_is_that_of_the_most_workers():
    section = EngineSection(workers=(2, 4))
    for workers, accumulation in ((2, 6), (3, 4), (4, 3)):
        shared = elastic.for_workers(stage(accumulation=3), section, workers)
        assert shared.accumulation == accumulation
        assert shared.micro_batch * shared.accumulation * workers == elastic.blocks_a_step(stage(2, 3), section) == 24


@pytest.mark.parametrize("workers", [4, (4, 4), (1, 2), (2, 2)])
def test_what_falls_evenly_is_taken(workers):
    assert elastic.misfit(stage(), EngineSection(workers=workers)) == ""


def test_a_range_that_does_not_divide_the_batch_is_refused_with_what_would():
    section = EngineSection(workers=(2, 4))
    problem = elastic.misfit(stage(accumulation=4), section)
    assert "32 blocks is 16 micro-batches" in problem and "3 workers of engine.workers [2, 4]" in problem
    assert "accumulation 6 would" in problem and "engine.workers [4, 4]" in problem
    assert elastic.misfit(stage(accumulation=6), section) == ""
    with pytest.raises(ValueError, match="3 workers came"):
        elastic.for_workers(stage(accumulation=4), section, 3)


def test_a_range_begins_with_its_least():
    with pytest.raises(ValueError, match="the least comes first"):
        EngineSection(workers=(4, 2))
