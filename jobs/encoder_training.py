"""A HuBERT from nothing, by a stronger teacher or by itself, under DeepSpeed on Ray Train; part of `train-encoder`.

Either way in iterations: one labels the clips with a teacher's units and trains a model to find them. Distillation has
one; HuBERT's own training begins with the teacher's (MFCCs) and goes on with units of the encoder before. What
iteration N makes lies in `encoder/iterations/N/` until all are done, its checkpoints in `checkpoints/encoder/N/`: a job
that was killed goes on in the iteration in which it was, from its newest checkpoint, and ends in the same weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.encoder_targets import Labelling
from jobs.shell import Context

if TYPE_CHECKING:
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.speech.config import EncoderTrainingSection
    from speechgpt.training.config import EngineSection, StageSection
    from speechgpt.training.hearing import Objective

PLACE = "encoder/iterations"
_KEPT = 2
_REPORTED_EVERY = 10


def train(context: Context) -> dict[str, Any]:
    """Every iteration that is missing; the last one's model becomes the workspace's encoder."""
    from jobs import ray_data

    workspace, last = context.workspace, _iterations(context.recipe.encoder.training)
    ray_data.connect(context.recipe.resources)
    figures: dict[str, Any] = {}
    for number in range(1, last + 1):
        if not workspace.exists(_figures_file(number)):
            _iterate(context, number)
        figures |= workspace.read_json(_figures_file(number))
    for name in workspace.list(_model(last)):
        workspace.write_bytes(f"encoder/{Path(name).name}", workspace.read_bytes(name))
    workspace.delete(PLACE)
    return figures


def _iterations(section: "EncoderTrainingSection") -> int:
    return section.masked.iterations if section.objective == "masked" else 1


def _model(number: int) -> str:
    return f"{PLACE}/{number}/hubert"


def _figures_file(number: int) -> str:
    """Written last, so that an iteration that has one is done."""
    return f"{PLACE}/{number}/figures.json"


def _run(number: int) -> str:
    return f"checkpoints/encoder/{number}"


def _labelling(section: "EncoderTrainingSection", number: int) -> Labelling:
    clusters = section.teacher.clusters if number == 1 else section.masked.clusters
    return Labelling(f"{PLACE}/{number}", clusters, "" if number == 1 else _model(number - 1))


def _iterate(context: Context, number: int) -> None:
    from jobs import stage_checkpoints
    from jobs.deepspeed_trainer import deepspeed_trainer
    from jobs.encoder_targets import label
    from jobs.labelled_clips import write_index
    from jobs.preemption import detect_hangs
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves

    recipe, workspace = context.recipe, context.workspace
    section, engine = recipe.encoder.training, recipe.engine
    labelling = _labelling(section, number)
    label(context, labelling)
    hours = write_index(workspace, labelling, section.workers) / 3600
    stage_checkpoints.tidy(workspace, _run(number), _KEPT, context.progress.say)
    detect_hangs(engine.collective_timeout_seconds, gpus=engine.gpus_per_worker > 0)
    # Steps of MLflow's curves go on over the iterations.
    first = (number - 1) * section.steps
    title = f"masked prediction, iteration {number}" if section.objective == "masked" else "distillation"
    with training_curves(context, title, first + section.steps) as curves:
        trainer = deepspeed_trainer(
            _train,
            {"curves": curves, "number": number, "first": first},
            recipe,
            workspace,
            _run(number),
            workers=section.workers,
            keep=_KEPT,
        )
        fitted(trainer, f"{title} of the encoder")
    workspace.delete(labelling.targets)
    made = workspace.read_json(f"{PLACE}/{number}/measured.json")
    figures = {"hours": hours, "teacher_clusters": labelling.clusters}
    if section.objective == "masked":
        figures |= {f"iteration_{number}_{name}": value for name, value in made.items() if name.startswith("hidden_")}
    workspace.write_json(_figures_file(number), figures | (made if number == _iterations(section) else {}))


def _train(config: dict[str, Any]) -> None:
    """One worker of an iteration."""
    from itertools import islice

    import ray.train
    from torch import distributed

    from jobs.labelled_clips import LabelledClips
    from jobs.stage_checkpoints import StageCheckpoints, Uploads
    from speechgpt.speech import hubert
    from speechgpt.training import checkpoints, hearing, node_local
    from speechgpt.training import engine as zero
    from speechgpt.training.ledger import Ledger

    recipe: Recipe = config["recipe"]
    workspace: Workspace = config["workspace"]
    number, first = config["number"], config["first"]
    section = recipe.encoder.training
    labelling = _labelling(section, number)
    where = ray.train.get_context()
    rank, world = where.get_world_rank(), where.get_world_size()
    engine_section, stage = _engine(recipe), _stage(section)
    zero.join(engine_section)
    clips = LabelledClips(workspace, labelling, recipe.seed)
    # Another seed for each iteration: a model that starts where its teacher started would have a head start only.
    seed = recipe.seed + number
    model = _objective(recipe, labelling.clusters, seed)
    engine = zero.under_zero(model, engine_section, stage, zero.configuration(engine_section, stage, world))
    store, uploads = StageCheckpoints(workspace, _run(number)), Uploads()
    done = checkpoints.restore(engine, store, Ledger())
    plan = islice(hearing.batch_plan(clips.seconds, clips.pieces, section, seed, rank, world), done, None)
    batches = ([clips[place] for place in batch] for batch in plan)
    for progress in hearing.train(engine, batches, section, seed=seed, first_step=done):
        figures: dict[str, Any] = {
            "step": first + progress.step,
            "iteration": number,
            "loss": progress.loss,
            "accuracy": progress.accuracy,
        }
        if progress.step % section.checkpoint_every == 0 or progress.step == section.steps:
            if rank == 0:
                config["curves"].send(figures | model.measure(clips.kept_out))
            directory = node_local.scratch("encoder")
            checkpoints.save(engine, directory, progress.step, Ledger())
            uploads.report(figures, directory)
        elif progress.step % _REPORTED_EVERY == 0 and rank == 0:
            config["curves"].send(figures)
    if rank == 0:
        # Also by an attempt that finds the last step done: Ray Train then has no figures.
        layer = recipe.encoder.layer if number == _iterations(section) else section.masked.layer
        layer = len(model.hubert.encoder.layers) if layer == -1 else layer
        parameters = sum(parameter.numel() for parameter in model.hubert.parameters())
        measured = {**model.measure(clips.kept_out), "parameters": parameters, "layer": layer}
        with workspace.stage(_model(number)) as directory:
            hubert.save(model.hubert, directory, layer=layer, normalize=_NORMALIZE)
        workspace.write_json(f"{PLACE}/{number}/measured.json", measured)
    distributed.barrier()


_NORMALIZE = True
"""Each clip to zero mean and unit variance, whatever the recording's level."""


def _objective(recipe: "Recipe", classes: int, seed: int) -> "Objective":
    import torch

    from speechgpt.speech.hubert import HubertFeatures, scratch
    from speechgpt.training import masked_prediction
    from speechgpt.training.distillation import Student

    section, architecture = recipe.encoder.training, recipe.encoder.architecture
    torch.manual_seed(seed)
    if section.objective == "distil":
        return Student(HubertFeatures(scratch(architecture, seed), recipe.encoder.layer, _NORMALIZE), classes)
    made = scratch(masked_prediction.architecture(section, architecture), seed)
    return masked_prediction.MaskedPredictor(HubertFeatures(made, -1, _NORMALIZE), classes, section.masked)


def _engine(recipe: "Recipe") -> "EngineSection":
    """An encoder is small beside a language model: its weights stay whole, and their products are in
    `encoder.training.precision`."""
    kept = {"zero_stage": min(recipe.engine.zero_stage, 2), "precision": "fp32", "offload": "none", "nvme_path": ""}
    return recipe.engine.model_copy(update=kept)


def _stage(section: "EncoderTrainingSection") -> "StageSection":
    """As DeepSpeed is told of it: a step is one batch of each worker."""
    from speechgpt.training.config import StageSection

    return StageSection(
        mixture={}, steps=section.steps, micro_batch=1, learning_rate=section.learning_rate, weight_decay=0.01
    )
