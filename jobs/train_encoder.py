"""Make the encoder: take a shipped or published one, or distil a small HuBERT from a teacher on Ray Train."""

import json
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.shell import Context, Job, JobError, command

_TARGETS = "encoder/targets"
_TEACHER = "encoder/teacher.safetensors"
_SHIPPED = "package:bundles/nano/encoder"
_SAMPLED_CLIPS = 1500
"""Clips whose frames the teacher's codebook is fitted on."""


def run(context: Context) -> dict[str, Any]:
    init = context.recipe.encoder.init
    if init == "scratch" and context.recipe.encoder.training.objective == "masked":
        raise JobError(
            "encoder.training.objective: this job distils only; masked prediction is in "
            "speechgpt.training.masked_prediction, without a job"
        )
    figures = _distil(context) if init == "scratch" else _adopt(context, init)
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
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves
    from jobs.training_storage import forget_broken_run

    ray_data.connect(context.recipe.resources)
    targets = _label(context)
    training = context.recipe.encoder.training
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


def _label(context: Context) -> dict[str, Any]:
    """The teacher's unit of every frame of every training clip, written beside the clip's sound."""
    import numpy as np
    import pyarrow.compute as pc
    import ray
    import ray.data
    from safetensors.numpy import load, save

    from speechgpt.speech import codebook

    workspace, training = context.workspace, context.recipe.encoder.training
    files = [name for name in workspace.list("speech") if name.endswith(".parquet")]
    recordings = (
        workspace.read_table("manifest/utterances.parquet") if workspace.exists("manifest/utterances.parquet") else None
    )
    shards: list[dict[str, Any]] = [{"file": name, "first": -1} for name in files]
    if recordings is not None:
        shards += [
            {"file": "manifest/utterances.parquet", "first": first} for first in range(0, len(recordings), _RECORDINGS)
        ]
    pool = context.recipe.resources.tokenisation
    actors: dict[str, Any] = {
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        "num_cpus": pool.cpus,
    }
    if not workspace.exists(_TEACHER):
        frames: dict[str, Any] = {}
        share = max(1, _SAMPLED_CLIPS // len(shards))
        dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
            TeacherSample,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
            fn_constructor_args=(workspace, context.recipe, share),
            **actors,
        )
        with context.progress.count("teacher: sampling", len(shards), "shards") as counter:
            for row in dataset.iter_rows():
                frames[row["shard"]] = np.frombuffer(row["frames"], np.float32).reshape(-1, row["dimensions"])
                counter.advance()
        # In the order of the shards, not of their arrival: the same seed fits the same codebook.
        sample = np.concatenate([frames[name] for name in sorted(frames)])
        sample = sample[np.random.default_rng(context.recipe.seed).permutation(len(sample))[: training.teacher.frames]]
        mean, deviation = sample.mean(0), sample.std(0) + 1e-5
        book, report = codebook.fit((sample - mean) / deviation, training.teacher.clusters, seed=context.recipe.seed)
        # The codebook is moved to the teacher's own scale, so that one affine map of a frame finds its unit.
        tensors = {"centroids": book.centroids.numpy(), "mean": mean, "deviation": deviation}
        workspace.write_bytes(_TEACHER, save(tensors))
        context.progress.say(f"teacher's codebook: {report}")
    teacher = ray.put(load(workspace.read_bytes(_TEACHER)))
    done = set(workspace.list(_TARGETS))
    missing = [s for s in shards if _targets_file(s) not in done]
    with context.progress.count(
        "teacher: labelling", len(shards), "shards", done=len(shards) - len(missing)
    ) as counter:
        if missing:
            labelled = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                TeacherLabels,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
                fn_constructor_args=(workspace, context.recipe, teacher),
                **actors,
            )
            for _ in labelled.iter_rows():
                counter.advance()
    seconds = pc.sum(workspace.read_table(_TARGETS)["seconds"]).as_py()
    return {"hours": seconds / 3600, "teacher_clusters": training.teacher.clusters}


_RECORDINGS = 200
"""Recordings in one shard."""


def _targets_file(shard: dict[str, Any]) -> str:
    return f"{_TARGETS}/{Path(shard['file']).stem}{'' if shard['first'] < 0 else '-' + str(shard['first'])}.parquet"


def _clips(workspace: Any, shard: dict[str, Any], max_seconds: float) -> Iterator[tuple[bytes, Any]]:
    """FLAC bytes and samples of the shard's training clips; what cannot be decoded is left to `tokenize` to report."""
    from speechgpt.runtime.recordings import sound_of
    from speechgpt.speech import audio

    table = workspace.read_table(shard["file"])
    if shard["first"] >= 0:
        table = table.slice(shard["first"], _RECORDINGS)
    for row in table.to_pylist():
        if row.get("split") == "heldout" or row.get("stranger"):
            continue
        try:
            wave = audio.decode(sound_of(row), max_seconds=max_seconds)
        except (audio.AudioError, OSError):
            continue
        yield row.get("audio") or audio.encode(wave, "flac"), wave


class TeacherSample:
    """Teacher frames of a few clips of a shard."""

    def __init__(self, workspace: Any, recipe: Any, share: int) -> None:
        from speechgpt.speech.teacher import open_teacher

        self._workspace, self._recipe, self._share = workspace, recipe, share
        self._teacher = open_teacher(recipe.encoder.training.teacher)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        clips = [wave for _, wave in _clips(self._workspace, shard, self._recipe.data.max_seconds)]
        chosen = np.random.default_rng(self._recipe.seed).permutation(len(clips))[: self._share]
        frames = np.concatenate([self._teacher.frames(clips[i]) for i in chosen] or [np.zeros((0, 1), np.float32)])
        return {
            "shard": _targets_file(shard),
            "frames": frames.astype(np.float32).tobytes(),
            "dimensions": frames.shape[1],
        }


class TeacherLabels:
    """Writes a shard's clips with the teacher's unit of each frame."""

    def __init__(self, workspace: Any, recipe: Any, teacher: Any) -> None:
        import ray
        import torch

        from speechgpt.speech.codebook import Codebook
        from speechgpt.speech.teacher import open_teacher

        torch.set_num_threads(1)
        tensors = ray.get(teacher)
        self._workspace, self._teacher = workspace, open_teacher(recipe.encoder.training.teacher)
        self._max_seconds = recipe.data.max_seconds
        self._mean, self._deviation = tensors["mean"], tensors["deviation"]
        self._codebook = Codebook(torch.from_numpy(tensors["centroids"].copy()))

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import pyarrow as pa
        import torch

        from speechgpt.speech.audio import SAMPLE_RATE

        rows = []
        for flac, wave in _clips(self._workspace, shard, self._max_seconds):
            frames = torch.from_numpy((self._teacher.frames(wave) - self._mean) / self._deviation)
            targets = self._codebook.assign(frames).numpy().astype("int16")
            rows.append({"audio": flac, "targets": targets, "seconds": len(wave) / SAMPLE_RATE})
        schema = pa.schema({"audio": pa.binary(), "targets": pa.list_(pa.int16()), "seconds": pa.float64()})
        self._workspace.write_table(_targets_file(shard), pa.Table.from_pylist(rows, schema))
        return {"clips": len(rows)}


_VALIDATION = 64
"""Clips kept out of distillation, for its frame accuracy."""


def _train(config: dict[str, Any]) -> None:
    """One worker of the distillation."""
    import numpy as np
    import ray.train
    import ray.train.torch
    import torch

    from speechgpt.speech import audio, hubert
    from speechgpt.training.distillation import Clip, Student, batch_plan, distil, frame_accuracy

    recipe, workspace = config["recipe"], config["workspace"]
    section = recipe.encoder.training
    normalize = True
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(1)
    table = workspace.read_table(_TARGETS).sort_by("seconds")
    order = np.random.default_rng(recipe.seed).permutation(len(table))
    kept_out, training = order[: min(_VALIDATION, len(order) // 8)], order[min(_VALIDATION, len(order) // 8) :]

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
    partial=(_TARGETS, _TEACHER, "checkpoints/encoder"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
