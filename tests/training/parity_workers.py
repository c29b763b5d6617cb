"""One of the two processes of test_parity: trains what `plan.json` in DIRECTORY names, one run after another."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from torch import distributed

from speechgpt.training import blocks, engine, loop
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.export import export
from speechgpt.training.objective import Objective
from speechgpt.training.starting import add_lora, load

directory = Path(sys.argv[1])
plan = json.loads((directory / "plan.json").read_text())


class Losses(list[float]):
    """The losses that the loop reports; checkpoints are neither kept nor found."""

    def report(self, figures: dict[str, float], part: Path | None) -> None:
        if part is None:
            self.append(figures["loss"])

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        return iter(())


def logits(model: torch.nn.Module) -> list[float]:
    """Of the model as it lies under the engine, in pieces or whole."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([plan["probe"]]), use_cache=False).logits.flatten().tolist()


engine.join(EngineSection(workers=2))
rank = distributed.get_rank()
outcome: dict[str, dict] = {}
for label, run in plan["runs"].items():
    section, stage = EngineSection(**run["engine"]), StageSection(**run["stage"])
    settings = engine.configuration(section, stage, 2)
    if section.zero_stage == 3:
        # So small a model would otherwise stay whole on every rank.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with engine.partitioned_loading(settings):
        model = load(directory / run["model"], section.gradient_checkpointing)
    if stage.lora:
        model = add_lora(model, stage.lora, "crossmodal", seed=1)
    trained = engine.under_zero(Objective(model, *plan["units"]), section, stage, settings)
    losses = Losses()
    loop.train(trained, blocks.Blocks(directory / "blocks.arrow"), stage, losses.report, losses)
    outcome[label] = {"losses": losses, "logits": logits(trained.module.model)}
    if section.zero_stage == 3 or isinstance(model, PeftModel):
        export(trained, directory / label if rank == 0 else None)
    distributed.barrier()
if rank == 0:
    (directory / "outcome.json").write_text(json.dumps(outcome))
distributed.barrier()
