"""Make the text-to-unit model: trained on this run's units and their texts on Ray Train, or taken from a directory.

Reads `units/`. Writes `text2unit/`, which the job `instructions` speaks question sets with if
`instructions.questions.spoken_by` is `text-to-unit`.
"""

import hashlib
import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.training.text_to_unit import Pair

MODEL = "text2unit/model"
_RUN = "checkpoints/text2unit"
_REPORTED_EVERY = 10
_LEAST_PAIRS = 20


def run(context: Context) -> dict[str, Any]:
    figures = _train(context) if context.recipe.text_to_unit.init == "train" else _adopt(context)
    return {"figures": figures, "outputs": [MODEL]}


def _adopt(context: Context) -> dict[str, Any]:
    from speechgpt.language.text_to_unit import TextToUnit
    from speechgpt.runtime.workspace import Workspace

    init, clusters = context.recipe.text_to_unit.init, context.recipe.codebook.clusters
    with Workspace(init).fetch("") as directory:
        maker = TextToUnit.load(directory)
        if (known := len(maker.unit_ids)) > clusters:
            raise JobError(
                f"text_to_unit.init: {init} writes {known} units; the codebook has {clusters} (codebook.clusters)"
            )
        with context.workspace.stage(MODEL) as folder:
            maker.save(folder)
    return {"parameters": sum(p.numel() for p in maker.model.parameters()), "units": known}


def pairs(workspace: "Workspace", recipe: "Recipe") -> "list[Pair]":
    """Units and texts of the training clips, in the order of their ids; of the recipe's speakers."""
    import pyarrow.dataset

    from jobs.build_instructions import learnt_from
    from speechgpt.training.text_to_unit import Pair

    only = recipe.text_to_unit.speakers == "answer"
    units = pyarrow.dataset.dataset(workspace.root("units"), filesystem=workspace.fs)
    wanted = learnt_from(recipe.voices.answer if only else None)
    table = units.to_table(["utterance_id", "units", "text"], filter=wanted).sort_by("utterance_id")
    found = [Pair(clip["text"], tuple(clip["units"])) for batch in table.to_batches(4096) for clip in batch.to_pylist()]
    if len(found) < _LEAST_PAIRS:
        whose = f"in the voice {recipe.voices.answer!r} " if only else ""
        raise JobError(
            f"{workspace.uri}: units/ has {len(found)} training clips {whose}with a text, too few to learn from; "
            + ("text_to_unit.speakers=all takes every voice" if only else "run tokenize on speech with transcripts")
        )
    return found


def split(found: "list[Pair]", held_out: int) -> "tuple[list[Pair], list[Pair]]":
    """(training, measuring): texts are drawn by their hash, and a text is only ever on one side."""
    count = min(held_out, len(found) // 10)
    texts = sorted({pair.text for pair in found}, key=lambda text: hashlib.sha256(text.encode()).digest())
    kept: set[str] = set()
    kept_pairs: dict[str, int] = {}
    for pair in found:
        kept_pairs[pair.text] = kept_pairs.get(pair.text, 0) + 1
    total = 0
    for text in texts:
        if total >= count:
            break
        kept.add(text)
        total += kept_pairs[text]
    return [p for p in found if p.text not in kept], [p for p in found if p.text in kept]


def _train(context: Context) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs import ray_data
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves
    from jobs.training_storage import forget_broken_run

    recipe, workspace, section = context.recipe, context.workspace, context.recipe.text_to_unit
    found = pairs(workspace, recipe)
    ray_data.connect(recipe.resources)
    forget_broken_run(workspace, _RUN, context.progress.say)
    on_gpu = section.gpus_per_worker > 0
    with training_curves(context, "text to unit", section.steps) as curves:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"recipe": recipe, "workspace": workspace, "curves": curves},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=section.workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": section.cpus_per_worker}
                | ({"GPU": section.gpus_per_worker} if on_gpu else {}),
                accelerator_type=(recipe.resources.accelerator or None) if on_gpu else None,
            ),
            run_config=ray.train.RunConfig(
                # The same name and storage make Ray Train go on from the checkpoints of an attempt that was killed.
                name="text2unit",
                storage_path=workspace.root("checkpoints"),
                storage_filesystem=workspace.fs,
                failure_config=ray.train.FailureConfig(max_failures=recipe.engine.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        result = fitted(trainer, "training the text-to-unit model")
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as folder, workspace.stage(MODEL) as directory:
        shutil.copytree(Path(folder, "model"), directory, dirs_exist_ok=True)
    return {"pairs": len(found), **{name: value for name, value in result.metrics.items() if name != "step"}}


def _worker(config: dict[str, Any]) -> None:
    """One worker of the training."""
    import ray.train
    import ray.train.torch
    import torch

    from speechgpt.training import text_to_unit

    recipe, section = config["recipe"], config["recipe"].text_to_unit
    where = ray.train.get_context()
    rank, world = where.get_world_rank(), where.get_world_size()
    training, held = split(pairs(config["workspace"], recipe), section.held_out)
    maker = text_to_unit.scratch(section, [p.text for p in training], recipe.codebook.clusters, recipe.seed)
    data, left_out = text_to_unit.examples(maker, training)
    model = ray.train.torch.prepare_model(maker.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=section.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    first_step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "training.pt"), weights_only=True)
        maker.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    plan = text_to_unit.batch_plan([len(each.target) for each in data], section.batch_tokens, recipe.seed)
    steps = text_to_unit.train(
        model,
        optimizer,
        data,
        islice(plan, first_step * world + rank, None, world),
        section,
        pad=maker.model.config.pad_token_id,
        start=maker.model.config.decoder_start_token_id,
        seed=recipe.seed * world + rank,
        first_step=first_step,
    )
    for done in steps:
        figures: dict[str, Any] = {"step": done.step, "loss": done.loss}
        if done.step % section.checkpoint_every and done.step != section.steps:
            if done.step % _REPORTED_EVERY == 0 and rank == 0:
                config["curves"].send(figures)
            continue
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                figures |= {"left_out": left_out, "parameters": sum(p.numel() for p in maker.model.parameters())}
                if done.step == section.steps:
                    figures |= {"measured_pairs": len(held), **text_to_unit.measure(maker, held, section)}
                maker.save(Path(folder, "model"))
                state = {"model": maker.model.state_dict(), "optimizer": optimizer.state_dict(), "step": done.step}
                torch.save(state, Path(folder, "training.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(figures, checkpoint=saved)


def is_needed(recipe: "Recipe") -> bool:
    """Whether the recipe's question sets are spoken by the model."""
    questions = recipe.instructions.questions
    return bool(questions.files) and questions.spoken_by == "text-to-unit"


def _is_trained(recipe: "Recipe") -> bool:
    return recipe.text_to_unit.init == "train"


JOB = Job(
    name="train-text-to-unit",
    part="text2unit",
    run=run,
    reads=lambda recipe, argument: ("tokenize",) if _is_trained(recipe) else (),
    sections=("text_to_unit", "codebook.clusters", "voices.answer"),
    partial=(_RUN,),
)
main = command(JOB)

if __name__ == "__main__":
    main()
