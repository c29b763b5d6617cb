"""Our side of `bench train`: the loop that every stage runs in, on packed blocks.

python -m speechgpt.benches.our_loop FOLDER
"""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from speechgpt.benches.turns import Turns
from speechgpt.training import engine as zero
from speechgpt.training import loop, starting
from speechgpt.training.blocks import Blocks
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.objective import Objective


class _None:
    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        return iter(())


def main(folder: Path) -> None:
    turns = Turns()
    plan = json.loads((folder / "plan.json").read_text())
    stage, section = StageSection(**plan["stage"]), EngineSection(**plan["engine"])
    zero.join(section)
    torch.manual_seed(plan["seed"])
    settings = zero.configuration(section, stage, section.most_workers)
    with zero.partitioned_loading(settings):
        model = starting.load(folder / "model", gradient_checkpointing=False)
    blocks = Blocks(folder / "blocks.arrow")
    engine = zero.under_zero(Objective(model, *plan["units"]), section, stage, settings)
    per_step = stage.micro_batch * stage.accumulation * section.most_workers

    def report(figures: dict[str, float], directory: Path | None) -> None:
        if directory is None:
            end = int(figures["step"]) * per_step
            tokens = blocks.tokens[end - stage.log_every * per_step : end].sum()
            turns.end(tokens=int(tokens), loss=figures["loss"])
            turns.begin()

    turns.begin()
    loop.train(engine, blocks, stage, report, _None())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
