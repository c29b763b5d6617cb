"""A language model small enough to train in a test, and blocks for it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

# Before DeepSpeed is imported, which otherwise looks for accelerators.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from speechgpt.training import blocks, engine, loop, packing
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.objective import Objective
from speechgpt.training.starting import add_lora

BLOCK = 32


@pytest.fixture(scope="session")
def block_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 packed blocks of 32 tokens out of a vocabulary of 64 whose last 20 are units."""
    rng = np.random.default_rng(0)
    packed = []
    for _ in range(64):
        rows = [(rng.integers(3, 64, length), np.ones(length, np.float32)) for length in (9, 14, 6)]
        packed.append(packing.pack(rows, BLOCK, pad_id=0))
    path = tmp_path_factory.mktemp("blocks") / "blocks.arrow"
    blocks.write(path, [blocks.table(range(64), packed)], BLOCK)
    return path


def stage(**changes) -> StageSection:
    settings = {"mixture": {"text": 1}, "steps": 8, "block": BLOCK, "micro_batch": 2, "learning_rate": 1e-2}
    return StageSection(**{**settings, "log_every": 2, "checkpoint_every": 3, **changes})


@pytest.fixture
def fresh_model() -> LlamaForCausalLM:
    """What `trained` starts from."""
    return tiny_llama()


class Directories:
    """A checkpoint store of plain directories, which also keeps what it is reported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.figures: list[dict[str, float]] = []

    def report(self, figures: dict[str, float], directory: Path | None) -> None:
        self.figures.append(figures)
        if directory is not None:
            shutil.copytree(directory, self.root / f"step-{int(figures['step']):03}", dirs_exist_ok=True)
            shutil.rmtree(directory)

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        for directory in sorted(self.root.glob("step-*"), reverse=True):
            yield nullcontext(directory)


@pytest.fixture
def trained(block_file: Path, tmp_path: Path) -> Callable:
    """Train the tiny model in this process; gives the engine and what was reported."""

    def run(
        root: str = "run",
        section: EngineSection | None = None,
        until: int | None = None,
        leaving=None,
        watch=None,
        **changes,
    ):
        section = section or EngineSection(workers=1, zero_stage=2)
        settings = stage(**changes)
        store = Directories(tmp_path / root)
        store.root.mkdir(exist_ok=True)
        engine.join(section)
        model = tiny_llama()
        if settings.lora:
            model = add_lora(model, settings.lora, "crossmodal", seed=1)
        configuration = engine.configuration(section, settings, workers=1)
        started = engine.under_zero(Objective(model, 44, 20), section, settings, configuration)

        def report(figures: dict[str, float], directory: Path | None) -> None:
            store.report(figures, directory)
            if until is not None and figures["step"] >= until and directory is not None:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            validation = watch(settings) if watch else None
            loop.train(started, blocks.Blocks(block_file), settings, report, store, 7, leaving, validation)
        return started, store

    return run
