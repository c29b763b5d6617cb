"""A stage's validation between Ray, the workspace and MLflow; what it looks at is in held_out, how in the library."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.held_out import HeldOut, divided, prepared
from jobs.shell import Context
from speechgpt.runtime.tracking import Tracking, TrackingError, revision

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from speechgpt.language.prompts import PromptFormat
    from speechgpt.language.vocabulary import Vocabulary
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.training.blocks import Blocks
    from speechgpt.training.config import StageName, StageSection

_ROWS = "instructions/rows.parquet"


def held_out(context: Context, name: "StageName", start: str) -> HeldOut | None:
    """What the stage is validated on; None if its recipe asks for no validation, or no row can be held out."""
    stage = context.recipe.stages[name]
    if not stage.validate_every:
        return None
    _, rows = divided(context.workspace.read_table(_ROWS), stage)
    with context.workspace.fetch(start) as directory:
        found = prepared(rows, stage, directory)
    if found is None:
        context.progress.say(f"{name}: no row is held out of {sorted(stage.mixture)}, so nothing is validated")
    elif found.questions and context.recipe.engine.zero_stage == 3:
        context.progress.say(f"{name}: under ZeRO-3 no questions are answered beside training; losses are measured")
    return found


def summary(workspace: "Workspace", name: str) -> dict[str, float]:
    """First, best and last of what was found; text kept before and after. Empty if nothing was validated."""
    from speechgpt.training.validation import LOSS, standing

    looks = _Diary(workspace, name).read()
    if not looks:
        return {}
    first, last = min(looks), max(looks)
    best = standing({step: figures[LOSS] for step, figures in looks.items()}).best_step
    figures = {"validation_best_step": float(best), "validation_best_loss": looks[best][LOSS]}
    for key in looks[last]:
        figures |= {f"{key}_before": looks[first][key], f"{key}_after": looks[last][key]}
    return figures


def register(context: Context, name: str) -> dict[str, float]:
    """Register the stage's model; its version. The tags say what it was made from, the run the rest.

    A tracking server that takes no local directory as a source is no reason for a trained stage to fail: it is said.
    """
    recipe, workspace = context.recipe, context.workspace
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    lineage = {"recipe": recipe.name, "revision": revision(), "start_from": recipe.stages[name].start_from}  # type: ignore[index]
    model = f"models/{name}"
    source, digest = workspace.path(model), workspace.digest(model)
    try:
        return {"model_version": float(tracking.register_stage(context.run, name, source, digest, lineage))}
    except TrackingError as error:
        context.progress.say(f"not registered: {error}")
        return {}


class StageWatch:
    """One worker's gauges and validation."""

    def __init__(
        self,
        config: Mapping[str, Any],
        stage: "StageSection",
        engine: "DeepSpeedEngine",
        blocks: "Blocks",
        vocabulary: "Vocabulary",
        prompts: "PromptFormat",
    ) -> None:
        """config: as Ray Train hands it to the worker. stage: as each of so many workers runs it."""
        from torch import distributed

        from speechgpt.training.gauges import Gauges, peak_flops
        from speechgpt.training.memory import dtype
        from speechgpt.training.shape import products

        self._recipe, self._workspace, self._name = config["recipe"], config["workspace"], config["stage"]
        self._stage, self._curves = stage, config["curves"]
        self._vocabulary, self._prompts = vocabulary, prompts
        self._rank, world = distributed.get_rank(), distributed.get_world_size()
        self.gauges = Gauges(
            products(engine.module.model),
            peak_flops(engine.device, dtype(self._recipe.engine)) if self._rank == 0 else None,
            world,
            blocks.tokens,
            self._stage.micro_batch * self._stage.accumulation * world,
            engine.device,
        )
        self._held: HeldOut | None = config["held_out"]
        self.validation = self._validation() if self._held else None

    def take_best(self, directory: Path | None) -> bool:
        """Whether the stage ends with its best model; if so it is put into `directory` (None on other ranks)."""
        if self._stage.leave != "best" or self.validation is None:
            return False
        if directory is not None:
            with self._workspace.fetch(self._best(self.validation.standing.best_step)) as best:
                shutil.copytree(best, directory, dirs_exist_ok=True)
        return True

    def _validation(self) -> Any:
        from speechgpt.training import blocks
        from speechgpt.training.validation import Validation

        assert self._held is not None
        sets = {}
        with TemporaryDirectory(prefix="held-out-") as folder:
            for number, (prefix, table) in enumerate(self._held.sets.items()):
                file = Path(folder, f"{number}.arrow")
                blocks.write(file, [table], self._stage.block)
                # The map outlives the name.
                sets[prefix] = blocks.Blocks(file)
        return Validation(sets, self._stage, _Diary(self._workspace, self._name), self._keep, self._answer)

    def _best(self, step: int) -> str:
        return f"checkpoints/{self._name}/best/step-{step:07}"

    def _keep(self, engine: "DeepSpeedEngine", step: int) -> None:
        """Save the best model so far, then remove those that no attempt can come back to."""
        from speechgpt.training.export import export

        with ExitStack() as opened:
            directory = None
            if self._rank == 0:
                directory = opened.enter_context(self._workspace.stage(self._best(step)))
            export(engine, directory)
            if directory is not None and not self._stage.lora:
                self._vocabulary.save(directory)
                self._prompts.save(directory)
        if self._rank == 0:
            self._forget_older(step)

    def _forget_older(self, step: int) -> None:
        # A resumed attempt starts from one of the kept checkpoints, and wants what was best then.
        reach = step - self._stage.keep * self._stage.checkpoint_every
        top = f"checkpoints/{self._name}/best"
        steps = {int(name.removeprefix(f"{top}/step-")[:7]) for name in self._workspace.list(top)}
        wanted = max((kept for kept in steps if kept <= reach), default=0)
        for older in sorted(kept for kept in steps if kept < wanted):
            self._workspace.delete(self._best(older))

    def _answer(self, engine: "DeepSpeedEngine", step: int) -> None:
        from speechgpt.training.answering import answered

        assert self._held is not None
        if self._rank or not self._held.questions or engine.zero_optimization_stage() == 3:
            return
        asked = [(question.kind, question.ids) for question in self._held.questions]
        answers = answered(engine, self._vocabulary, self._prompts, asked, self._recipe.generation)
        rows = [question.shown for question in self._held.questions]
        told = [{**answer, "row": row} for answer, row in zip(answers, rows, strict=True)]
        self._curves.send({"step": step, "answers": told})


class _Diary:
    def __init__(self, workspace: "Workspace", stage: str) -> None:
        self._workspace, self._file = workspace, f"checkpoints/{stage}/validation.json"

    def read(self) -> dict[int, dict[str, float]]:
        if not self._workspace.exists(self._file):
            return {}
        return {int(step): figures for step, figures in self._workspace.read_json(self._file).items()}

    def write(self, looks: Mapping[int, Mapping[str, float]]) -> None:
        self._workspace.write_json(self._file, {str(step): dict(figures) for step, figures in looks.items()})
