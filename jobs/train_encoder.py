"""Make the encoder: take a shipped or published one, or train a HuBERT on Ray Train, by a teacher or by itself."""

import json
import tempfile
from collections.abc import Callable
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.shell import Context, Job, command

_TARGETS = "encoder/targets"
_TEACHER = "encoder/teacher.safetensors"
_SHIPPED = "package:bundles/nano/encoder"


def run(context: Context) -> dict[str, Any]:
    from jobs import masked_pretraining

    encoder = context.recipe.encoder
    if encoder.init != "scratch":
        figures = _adopt(context, encoder.init)
    elif encoder.training.objective == "masked":
        figures = masked_pretraining.pretrain(context)
    else:
        figures = _distil(context)
    files = ["config.json", "model.safetensors", "preprocessor_config.json", "unit_config.json"]
    return {"figures": figures, "outputs": [f"encoder/{name}" for name in files]}


def _adopt(context: Context, init: str) -> dict[str, Any]:
    """Copy the shipped encoder, or one in Hugging Face layout, into the workspace."""
    from transformers import AutoFeatureExtractor, HubertModel

    from speechgpt.speech import hubert

    layer = context.recipe.encoder.layer
    if init == "shipped":
        directory = Path(str(resources.files("speechgpt") / "bundles" / "nano" / "encoder"))
    else:
        directory = Path(init)
    model = HubertModel.from_pretrained(directory if directory.is_dir() else init)
    if (directory / hubert.UNIT_CONFIG).is_file() and layer == -1:
        layer = json.loads((directory / hubert.UNIT_CONFIG).read_text())["layer"]
    extractor = AutoFeatureExtractor.from_pretrained(directory if directory.is_dir() else init)
    features = hubert.HubertFeatures(model, layer, extractor.do_normalize)
    _write(context, lambda path: hubert.save(model, path, layer=features.layer, normalize=features.normalize))
    return {"parameters": sum(p.numel() for p in model.parameters()), "layer": features.layer}


def _write(context: Context, save: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            context.workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())


def _distil(context: Context) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs import ray_data
    from jobs.encoder_targets import Labelling, label
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves
    from jobs.training_storage import forget_broken_run

    ray_data.connect(context.recipe.resources)
    training = context.recipe.encoder.training
    targets = label(context, Labelling(_TARGETS, _TEACHER, training.teacher.clusters))
    forget_broken_run(context.workspace, "checkpoints/encoder", context.progress.say)
    with training_curves(context, "distilling", training.steps) as curves:
        trainer = TorchTrainer(
            _train,
            train_loop_config={"recipe": context.recipe, "workspace": context.workspace, "curves": curves},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=training.workers, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name="encoder",
                storage_path=context.workspace.root("checkpoints"),
                storage_filesystem=context.workspace.fs,
                failure_config=ray.train.FailureConfig(max_failures=context.recipe.engine.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        result = fitted(trainer, "training the encoder")
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as folder:
        for file in sorted(Path(folder, "hubert").iterdir()):
            context.workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())
    context.workspace.delete(_TARGETS)
    return {**targets, "frame_accuracy": result.metrics["frame_accuracy"], "loss": result.metrics["loss"]}


def _train(config: dict[str, Any]) -> None:
    """One worker of the distillation."""
    import numpy as np
    import ray.train
    import ray.train.torch
    import torch

    from jobs.encoder_targets import shares
    from speechgpt.speech import audio, hubert
    from speechgpt.training.distillation import Clip, Student, batch_plan, distil, frame_accuracy

    recipe, workspace = config["recipe"], config["workspace"]
    section = recipe.encoder.training
    normalize = True
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(1)
    table = workspace.read_table(_TARGETS).sort_by("seconds")
    training, kept_out = shares(len(table), recipe.seed)

    def clip(index: int) -> Clip:
        row = int(training[index])
        return Clip(audio.decode(table["audio"][row].as_py()), np.array(table["targets"][row].as_py(), np.int16))

    features = hubert.HubertFeatures(
        hubert.scratch(recipe.encoder.architecture, recipe.seed), recipe.encoder.layer, normalize
    )
    plain = Student(features, section.teacher.clusters)
    student = ray.train.torch.prepare_model(plain)
    optimizer = torch.optim.AdamW(student.parameters(), lr=section.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    first_step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "training.pt"), weights_only=True)
        plain.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    seconds = table["seconds"].to_numpy()[training].tolist()
    batches = islice(batch_plan(seconds, section, world, recipe.seed), first_step * world + rank, None, world)
    steps = distil(
        student, optimizer, clip, batches, section, seed=recipe.seed + rank, normalize=normalize, first_step=first_step
    )
    for done in steps:
        metrics: dict[str, Any] = {"step": done.step, "loss": done.loss, "accuracy": done.accuracy}
        if done.step % section.checkpoint_every and done.step != section.steps:
            if done.step % 10 == 0 and rank == 0:
                config["curves"].send(metrics)
            continue
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                clips = [
                    Clip(
                        audio.decode(table["audio"][int(i)].as_py()),
                        np.array(table["targets"][int(i)].as_py(), np.int16),
                    )
                    for i in kept_out
                ]
                metrics["frame_accuracy"] = frame_accuracy(plain, clips, normalize)
                hubert.save(features.model, Path(folder, "hubert"), layer=features.layer, normalize=normalize)
                state = {"student": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": done.step}
                torch.save(state, Path(folder, "training.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)


JOB = Job(
    name="train-encoder",
    part="encoder",
    run=run,
    reads=("manifest", "synthesize"),
    # All of the encoder but `long`, which training does not depend on.
    sections=(
        "encoder.init",
        "encoder.layer",
        "encoder.architecture",
        "encoder.batch_seconds",
        "encoder.training",
        "data",
    ),
    files=lambda recipe: [f"{_SHIPPED}/model.safetensors"] if recipe.encoder.init == "shipped" else [],
    partial=(_TARGETS, _TEACHER, "checkpoints/encoder", "encoder/iterations"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
