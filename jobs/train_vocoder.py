"""Train the unit vocoder on the answer voice or on recordings, or fit a shipped one to this run's codebook and tune it.

On Ray Train. Reads `speech/`, or the recordings of `manifest/utterances.parquet`, and `encoder/`. Writes `vocoder/`.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jobs import shards
from jobs.shell import Context, Job, JobError, command

_CLIPS = "vocoder/clips"
_FINAL = "vocoder"
_SHIPPED = "package:bundles/nano/vocoder"
_OTHERS, _DISGUISES = 4, 2
"""Voices that say the same, and disguises where nobody does: each takes as much room as the clip's own features."""
_MEASURED = 200
"""Clips whose length the predicted durations are brought to."""
_HEARD = 3
"""Clips that MLflow plays at each checkpoint, as they were and as the vocoder makes them; at least one a speaker."""


def run(context: Context) -> dict[str, Any]:
    import ray.data
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs import ray_data
    from jobs.spoken_samples import log_samples
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves
    from jobs.training_storage import forget_broken_run

    ray_data.connect(context.recipe.resources)
    workspace, training = context.workspace, context.recipe.vocoder.training
    context.run.log_params({"speakers": ", ".join(speakers(context.recipe))})
    seconds = _features(context)
    forget_broken_run(context.workspace, "checkpoints/vocoder", context.progress.say)

    def listen(step: int, heard: list[dict[str, Any]]) -> None:
        sounds = [sample.pop("sound") for sample in heard]
        log_samples(context, step, heard, sounds)

    with training_curves(context, "vocoder", training.steps + training.duration_steps, listen) as curves:
        trainer = TorchTrainer(
            _train,
            train_loop_config={"recipe": context.recipe, "workspace": workspace, "curves": curves},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=training.workers, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name="vocoder",
                storage_path=workspace.root("checkpoints"),
                storage_filesystem=workspace.fs,
                failure_config=ray.train.FailureConfig(max_failures=context.recipe.engine.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        result = fitted(trainer, "training the vocoder")
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as folder:
        for file in sorted(Path(folder, "vocoder").iterdir()):
            workspace.write_bytes(f"{_FINAL}/{file.name}", file.read_bytes())
    workspace.delete(_CLIPS)
    figures = {k: v for k, v in result.metrics.items() if isinstance(v, int | float)}
    return {
        "figures": {**figures, "hours": seconds / 3600},
        "outputs": [f"{_FINAL}/config.json", f"{_FINAL}/model.safetensors"],
    }


def speakers(recipe: Any) -> list[str]:
    """Voices that the vocoder learns, by speaker number: the recorded ones, or the answer voice and others by name.

    Raises JobError when `vocoder.generator.speakers` asks for more than the recipe has.
    """
    count = max(1, recipe.vocoder.generator.speakers)
    if recorded := recipe.vocoder.recorded:
        if count != len(recorded):
            raise JobError(
                f"vocoder.generator.speakers: {count}, but vocoder.recorded names {len(recorded)}: {list(recorded)}"
            )
        return list(recorded)
    voices = [recipe.voices.answer, *sorted(set(recipe.voices.questions) - {recipe.voices.answer})]
    if count > len(voices):
        raise JobError(
            f"vocoder.generator.speakers: {count} speakers, but voices.questions has {len(voices)}: {voices}; "
            "name more voices or fewer speakers"
        )
    return voices[:count]


def _features(context: Context) -> float:
    """Encoder features of the speakers' training clips, beside their sound; returns seconds of audio."""
    import pyarrow.compute as pc
    import ray.data

    workspace = context.workspace
    recorded = bool(context.recipe.vocoder.recorded)
    plan = [s for s in shards.plan(workspace, context.recipe) if (s.file == shards.RECORDINGS) == recorded]
    done = set(workspace.list(_CLIPS))
    # Of a corpus that was another, or cut otherwise, when an attempt was killed.
    for stale in done - {_clips_of(shard) for shard in plan}:
        workspace.delete(stale)
    missing = [asdict(shard) for shard in plan if _clips_of(shard) not in done]
    pool = context.recipe.resources.tokenisation
    with context.progress.count("features", len(plan), "shards", done=len(plan) - len(missing)) as counter:
        if missing:
            dataset = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                ClipFeatures,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
                fn_constructor_args=(workspace, context.recipe),
                compute=ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
            )
            for _ in dataset.iter_rows():
                counter.advance()
    table, voices = workspace.read_table(_CLIPS) if plan else _clip_schema().empty_table(), speakers(context.recipe)
    heard = set(table["speaker"].to_pylist())
    if silent := [voice for number, voice in enumerate(voices) if number not in heard]:
        place, key = (shards.RECORDINGS, "vocoder.recorded") if recorded else ("speech/", "voices.answer")
        raise JobError(f"{place} has no training clip of {silent}, which {key} and vocoder.generator.speakers take in")
    return pc.sum(table["seconds"]).as_py()


def _clips_of(shard: shards.Shard) -> str:
    return f"{_CLIPS}/{shard.name}.parquet"


class ClipFeatures:
    """Writes a shard's clips of the speakers with their pitch and features, and those of others who say the same.

    Others are other voices of the shard that speak the same text, moved to the frames at which the speaker says it;
    where there is none, the clip itself in another throat and room.
    """

    def __init__(self, workspace: Any, recipe: Any) -> None:
        import torch

        from speechgpt.speech.hubert import HubertFeatures

        torch.set_num_threads(1)
        self._workspace = workspace
        self._numbers = {voice: number for number, voice in enumerate(speakers(recipe))}
        self._strangers = recipe.vocoder.training.strangers > 0
        self._longest = recipe.data.max_seconds
        with workspace.fetch("encoder") as directory:
            self._features = HubertFeatures.load(directory, device=recipe.resources.tokenisation.device)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        from speechgpt.speech import audio, augment, pitch
        from speechgpt.speech.alignment import align

        part = shards.Shard(**shard)
        clips = list(shards.decoded(self._training_clips(part), self._longest))
        rows = []
        for clip, wave in [(clip, wave) for clip, wave in clips if clip["voice"] in self._numbers]:
            [frames] = self._heard([wave])
            draw = np.random.default_rng(int(clip["sha256"][:16], 16))
            same = [
                other
                for c, other in clips
                if clip["text"] and c["text"] == clip["text"] and c["voice"] != clip["voice"]
            ]
            others = self._heard(same[: _OTHERS if self._strangers else 0])
            strangers = [other[align(frames, other)] for other in others]
            if self._strangers and not strangers:
                strangers = self._heard([augment.disguised(wave, draw) for _ in range(_DISGUISES)])
            row = {
                "id": clip["id"],
                "audio": clip.get("audio") or audio.encode(wave, "flac"),
                "features": _packed(frames),
                "strangers": [_packed(other) for other in strangers],
                "pitch": _packed(pitch.track(wave, len(frames))),
                "seconds": len(wave) / audio.SAMPLE_RATE,
                "speaker": self._numbers[clip["voice"]],
                "text": clip["text"],
            }
            rows.append(row)
        table = pa.Table.from_pylist(rows, _clip_schema())
        self._workspace.write_table(_clips_of(part), table)
        return {"clips": len(rows)}

    def _training_clips(self, shard: shards.Shard) -> Iterator[dict[str, Any]]:
        """Of a file of `speech/`, or of the speakers' recordings."""
        for clip in self._workspace.read_rows(shard.file, shard.first, shard.count).to_pylist():
            if clip["split"] == "heldout":
                continue
            if shard.file != shards.RECORDINGS:
                yield clip
            elif clip["speaker"] in self._numbers:
                yield {**clip, "voice": clip["speaker"]}

    def _heard(self, waves: list[Any]) -> list[Any]:
        """Features of each wave, float32 [frames, dimensions]."""
        return [frames.numpy() for frames in self._features(waves)] if waves else []


def _clip_schema() -> Any:
    import pyarrow as pa

    arrays = {name: pa.binary() for name in ("audio", "features", "pitch")}
    rest = {"seconds": pa.float64(), "speaker": pa.int32(), "text": pa.string()}
    return pa.schema({"id": pa.string(), **arrays, "strangers": pa.list_(pa.binary()), **rest})


def _packed(values: Any) -> bytes:
    """Half precision, as the table of clips holds features and pitch."""
    return values.astype("float16").tobytes()


def _train(config: dict[str, Any]) -> None:
    """One worker of the vocoder's training."""
    import numpy as np
    import ray.train
    import torch

    from speechgpt.speech import audio
    from speechgpt.speech.codebook import Codebook
    from speechgpt.speech.hubert import HubertFeatures
    from speechgpt.speech.vocoder import Vocoder
    from speechgpt.training.vocoding import Recording, VocoderTrainer, calibrate_durations, train, train_durations

    recipe, workspace = config["recipe"], config["workspace"]
    section = recipe.vocoder.training
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    table = workspace.read_table(_CLIPS).sort_by("id")
    with workspace.fetch("encoder") as directory:
        codebook = Codebook.load(directory)
        encoder = HubertFeatures.load(directory, frozen=False) if section.likeness else None
    dimensions = codebook.centroids.shape[1]
    of_clip = table["speaker"].to_pylist()

    def recording(index: int) -> Recording:
        row = {name: table[name][index].as_py() for name in ("audio", "features", "strangers", "pitch")}
        features, *strangers = (
            np.frombuffer(packed, np.float16).reshape(-1, dimensions) for packed in (row["features"], *row["strangers"])
        )
        pitch = np.frombuffer(row["pitch"], np.float16).astype(np.float32)
        return Recording(audio.decode(row["audio"]), features, pitch, tuple(strangers), of_clip[index])

    model = initial_model(recipe, codebook)
    codebooks = [codebook, *_further_codebooks(section.codebooks, recording, len(table), recipe.seed)]
    trainer = VocoderTrainer(model, codebooks, section, encoder)
    first_step = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "training.pt"), weights_only=True)
        trainer.restore(state)
        first_step = state["step"]

    def average(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if world > 1 and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world

    def save(step: int, losses: dict[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                torch.save({**trainer.state(), "step": step}, Path(folder, "training.pt"))
                # Saving folds the weight norm away, so a copy is saved and the trained one goes on.
                copy = initial_model(recipe, codebook)
                copy.load_state_dict(model.state_dict())
                vocoder = Vocoder(copy)
                if copy.from_centroids is not None:
                    vocoder.fit_codebook(codebook.centroids)
                calibrate_durations(vocoder, codebook, map(recording, range(min(_MEASURED, len(table)))))
                vocoder.save(Path(folder, "vocoder"))
                config["curves"].send({"step": step, "answers": _heard(vocoder, codebook, recording, table)})
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step, **losses}, checkpoint=saved)

    steps = train(
        trainer, recording, len(table), seed=recipe.seed * world + rank, first_step=first_step, synchronise=average
    )

    def finish() -> None:
        if rank == 0:
            for number, loss in enumerate(train_durations(trainer, recording, len(table), recipe.seed), start=1):
                if number % 10 == 0:
                    config["curves"].send({"step": section.steps + number, "duration": loss})

    if section.steps == first_step:
        if checkpoint is None:
            finish()
        save(first_step, {})
    for losses in steps:
        step = int(losses.pop("step"))
        if step == section.steps:
            finish()
        if step % section.checkpoint_every == 0 or step == section.steps:
            save(step, losses)
        elif step % 10 == 0 and rank == 0:
            config["curves"].send({"step": step, **losses})


def _heard(vocoder: Any, codebook: Any, recording: Any, table: Any) -> list[dict[str, Any]]:
    """A few clips as they were, and as the vocoder makes them of their units: the same ones at every checkpoint."""
    import torch

    from speechgpt.speech.units import merge

    of_clip = table["speaker"].to_pylist()
    first = [of_clip.index(speaker) for speaker in sorted(set(of_clip))]
    chosen = [*first, *(index for index in range(len(table)) if index not in first)][: max(_HEARD, len(first))]
    samples = []
    for index in chosen:
        clip = recording(index)
        units = merge(codebook.assign(torch.from_numpy(clip.frames.astype("float32"))).numpy()).units.tolist()
        told = {"clip": table["id"][index].as_py(), "speaker": clip.speaker, "text": table["text"][index].as_py()}
        [sound] = vocoder.synthesize([units], speaker=clip.speaker if vocoder.model.spkr is not None else None)
        samples += [{**told, "sound": clip.wave}, {**told, "units": units, "sound": sound}]
    return samples


def initial_model(recipe: Any, codebook: Any) -> Any:
    """The model that training starts from: random, the shipped one, or a directory's, fitted to this codebook.

    One of another encoder keeps how sound is made; which units ask for which sound it has to learn anew.
    """
    from speechgpt.speech.vocoder import UnitVocoder, Vocoder

    init, dimensions = recipe.vocoder.init, codebook.centroids.shape[1]
    if init == "scratch":
        known = dimensions if recipe.vocoder.training.codebooks else 0
        return UnitVocoder(recipe.vocoder.generator, codebook.clusters, known)
    directory = resources.files("speechgpt") / "bundles" / "nano" / "vocoder" if init == "shipped" else init
    vocoder = Vocoder.load(str(directory))
    if vocoder.model.from_centroids is not None:
        if vocoder.model.centroid_dimensions != dimensions:
            if not recipe.vocoder.training.steps:
                raise JobError(
                    f"vocoder.init: {init!r} was trained for an encoder of {vocoder.model.centroid_dimensions} "
                    f"dimensions, this one has {dimensions}; give vocoder.training.steps"
                )
            vocoder.model.listen_anew(dimensions)
        vocoder.fit_codebook(codebook.centroids)
    rounding = {"rounding": recipe.vocoder.generator.rounding}
    vocoder.model.section = vocoder.model.section.model_copy(update=rounding)
    return vocoder.model


def _further_codebooks(sizes: tuple[int, ...], recording: Any, count: int, seed: int) -> list[Any]:
    """Codebooks of other sizes on these clips' own features."""
    import numpy as np

    from speechgpt.speech import codebook

    if not sizes:
        return []
    chosen = np.random.default_rng(seed).permutation(count)[:400]
    frames = np.concatenate([recording(int(i)).frames for i in chosen]).astype(np.float32)
    return [codebook.fit(frames, size, seed=seed + size, iterations=15)[0] for size in sizes]


JOB = Job(
    name="train-vocoder",
    part="vocoder",
    run=run,
    reads=("manifest", "synthesize", "train-encoder", "fit-units"),
    sections=("vocoder", "voices"),
    files=lambda recipe: [f"{_SHIPPED}/model.safetensors"] if recipe.vocoder.init == "shipped" else [],
    partial=(_CLIPS, "checkpoints/vocoder"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
