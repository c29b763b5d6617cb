"""HuBERT's own training inside the job `train-encoder`: iterations of masked prediction under DeepSpeed on Ray Train.

An iteration labels the clips with its teacher's units (MFCCs' first, then those of the encoder before it) and trains a
model from nothing. What iteration N makes lies in `encoder/iterations/N/` until all are done, its checkpoints in
`checkpoints/encoder/N/`: a job that was killed goes on in the iteration in which it was, from its newest checkpoint,
and ends in the same weights.
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

_PLACE = "encoder/iterations"
_KEPT = 2
_REPORTED_EVERY = 10


def pretrain(context: Context) -> dict[str, Any]:
    """Every iteration that is missing; the last one's model becomes the workspace's encoder."""
    from jobs import ray_data

    workspace, section = context.workspace, context.recipe.encoder.training
    ray_data.connect(context.recipe.resources)
    figures: dict[str, Any] = {}
    for number in range(1, section.masked.iterations + 1):
        if not workspace.exists(_figures_file(number)):
            _iterate(context, number)
        figures |= workspace.read_json(_figures_file(number))
    for name in workspace.list(_model(number)):
        workspace.write_bytes(f"encoder/{Path(name).name}", workspace.read_bytes(name))
    workspace.delete(_PLACE)
    return figures


def _model(number: int) -> str:
    return f"{_PLACE}/{number}/hubert"


def _figures_file(number: int) -> str:
    """Written last, so that an iteration that has one is done."""
    return f"{_PLACE}/{number}/figures.json"


def _run(number: int) -> str:
    return f"checkpoints/encoder/{number}"


def _labelling(section: "EncoderTrainingSection", number: int) -> Labelling:
    clusters = section.teacher.clusters if number == 1 else section.masked.clusters
    teacher = "" if number == 1 else _model(number - 1)
    return Labelling(f"{_PLACE}/{number}/targets", f"{_PLACE}/{number}/teacher.safetensors", clusters, teacher)


def _iterate(context: Context, number: int) -> None:
    from jobs import stage_checkpoints
    from jobs.deepspeed_trainer import deepspeed_trainer
    from jobs.encoder_targets import label
    from jobs.preemption import detect_hangs
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves

    recipe, workspace = context.recipe, context.workspace
    section, engine = recipe.encoder.training, recipe.engine
    labelling = _labelling(section, number)
    targets = label(context, labelling)
    stage_checkpoints.tidy(workspace, _run(number), _KEPT, context.progress.say)
    detect_hangs(engine.collective_timeout_seconds, gpus=engine.gpus_per_worker > 0)
    # Steps of MLflow's curves go on over the iterations.
    first = (number - 1) * section.steps
    title = f"masked prediction, iteration {number}"
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
    made = workspace.read_json(f"{_PLACE}/{number}/measured.json")
    last = {} if number < section.masked.iterations else {name: made[name] for name in made if name != "iteration"}
    per_iteration = {f"iteration_{number}_{name}": made[name] for name in ("hidden_loss", "hidden_accuracy")}
    workspace.write_json(_figures_file(number), {"hours": targets["hours"], **per_iteration, **last})


def _train(config: dict[str, Any]) -> None:
    """One worker of an iteration."""
    from itertools import islice

    import numpy as np
    import ray.train
    import torch
    from torch import distributed

    from jobs.encoder_targets import shares
    from jobs.stage_checkpoints import StageCheckpoints, Uploads
    from speechgpt.speech import audio, hubert
    from speechgpt.training import checkpoints, masked_prediction, node_local
    from speechgpt.training import engine as zero
    from speechgpt.training.distillation import Clip, batch_plan
    from speechgpt.training.ledger import Ledger

    recipe: Recipe = config["recipe"]
    workspace: Workspace = config["workspace"]
    number, first = config["number"], config["first"]
    section = recipe.encoder.training
    labelling = _labelling(section, number)
    normalize = True
    where = ray.train.get_context()
    rank, world = where.get_world_rank(), where.get_world_size()
    engine_section, stage = _engine(recipe), _stage(section)
    zero.join(engine_section)
    table = workspace.read_table(labelling.targets).sort_by("seconds")
    training, kept_out = shares(len(table), recipe.seed)

    def clip(row: int) -> Clip:
        return Clip(audio.decode(table["audio"][row].as_py()), np.array(table["targets"][row].as_py(), np.int16))

    # Another seed for each iteration: a model that starts where its teacher started would have a head start only.
    seed = recipe.seed + number
    torch.manual_seed(seed)
    made = hubert.scratch(masked_prediction.architecture(section, recipe.encoder.architecture), seed)
    features = hubert.HubertFeatures(made, -1, normalize)
    model = masked_prediction.MaskedPredictor(features, labelling.clusters, section.masked)
    engine = zero.under_zero(model, engine_section, stage, zero.configuration(engine_section, stage, world))
    store, uploads = StageCheckpoints(workspace, _run(number)), Uploads()
    done = checkpoints.restore(engine, store, Ledger())
    seconds = table["seconds"].to_numpy()[training].tolist()
    batches = islice(batch_plan(seconds, section, world, seed), done * world + rank, None, world)
    steps = masked_prediction.pretrain(
        engine, lambda i: clip(int(training[i])), batches, section, seed=seed, normalize=normalize, first_step=done
    )
    for progress in steps:
        figures: dict[str, Any] = {
            "step": first + progress.step,
            "iteration": number,
            "loss": progress.loss,
            "accuracy": progress.accuracy,
        }
        if progress.step % section.checkpoint_every == 0 or progress.step == section.steps:
            if rank == 0:
                heard = [clip(int(row)) for row in kept_out]
                config["curves"].send(figures | masked_prediction.measure(model, heard, section.masked, normalize))
            directory = node_local.scratch("encoder")
            checkpoints.save(engine, directory, progress.step, Ledger())
            uploads.report(figures, directory)
        elif progress.step % _REPORTED_EVERY == 0 and rank == 0:
            config["curves"].send(figures)
    if rank == 0:
        # Also by an attempt that finds the last step done: Ray Train then has no figures.
        last = number == section.masked.iterations
        layer = recipe.encoder.layer if last else section.masked.layer
        layer = len(made.encoder.layers) if layer == -1 else layer
        heard = [clip(int(row)) for row in kept_out]
        measured = masked_prediction.measure(model, heard, section.masked, normalize)
        measured |= {"parameters": sum(p.numel() for p in made.parameters()), "layer": layer}
        with workspace.stage(_model(number)) as directory:
            hubert.save(made, directory, layer=layer, normalize=normalize)
        workspace.write_json(f"{_PLACE}/{number}/measured.json", {"iteration": number, **measured})
    distributed.barrier()


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
