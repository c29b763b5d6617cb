"""What an encoder is trained to predict: a teacher's unit of every frame of every training clip, beside its sound."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import Any

from jobs import shards
from jobs.shards import Shard
from jobs.shell import Context, JobError

_SAMPLED_CLIPS = 1500
"""Clips whose frames the teacher's codebook is fitted on, about as many of each shard."""
_SPARE = 2
"""Of so many times the frames wanted a clip gives its part, since a shorter one gives less."""
GROUP_ROWS = 32
"""Clips that are read together."""


@dataclass(frozen=True)
class Labelling:
    """One teacher's listening to the corpus."""

    place: str
    """Directory of the workspace for all that it makes."""
    clusters: int
    encoder: str = ""
    """Directory of the workspace with a HuBERT that is the teacher; empty: the recipe's `encoder.training.teacher`."""

    @property
    def targets(self) -> str:
        """Directory for the clips and their units."""
        return f"{self.place}/targets"

    @property
    def codebook(self) -> str:
        """File for the teacher's codebook."""
        return f"{self.place}/teacher.safetensors"

    @property
    def index(self) -> str:
        """File that lists the pieces of `targets` (`jobs/labelled_clips.py`)."""
        return f"{self.place}/pieces.parquet"

    def file(self, shard: Shard) -> str:
        """Where the clips of a shard go."""
        return f"{self.targets}/{shard.name}.parquet"


def label(context: Context, labelling: Labelling) -> None:
    """Write `labelling.targets`, but for what an attempt that was killed has written."""
    import numpy as np
    import ray
    import ray.data
    from safetensors.numpy import load, save

    from speechgpt.speech import codebook

    workspace, training = context.workspace, context.recipe.encoder.training
    found = shards.plan(workspace, context.recipe)
    if not found:
        raise JobError(
            f"{workspace.uri}: no clip in speech/ or manifest/utterances.parquet; run manifest and synthesize"
        )
    pool = context.recipe.resources.tokenisation
    actors: dict[str, Any] = {
        "compute": ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus if labelling.encoder or training.teacher.kind == "hubert" else 0,
    }
    if not workspace.exists(labelling.codebook):
        frames: dict[str, Any] = {}
        asked = [asdict(shard) for shard in _asked(workspace, found, context.recipe.seed)]
        dataset = ray.data.from_items(asked, override_num_blocks=len(asked)).map(
            TeacherSample,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
            fn_constructor_args=(workspace, context.recipe, labelling, len(asked)),
            **actors,
        )
        with context.progress.count("teacher: sampling", len(asked), "shards") as counter:
            for row in dataset.iter_rows():
                if row["frames"]:
                    frames[row["shard"]] = np.frombuffer(row["frames"], np.float32).reshape(-1, row["dimensions"])
                counter.advance()
        if not frames:
            raise JobError(f"{workspace.uri}: no training clip of at most data.max_seconds that can be decoded")
        # In the order of the shards, not of their arrival: the same seed fits the same codebook.
        sample = np.concatenate([frames[name] for name in sorted(frames)])
        sample = sample[np.random.default_rng(context.recipe.seed).permutation(len(sample))[: training.teacher.frames]]
        mean, deviation = sample.mean(0), sample.std(0) + 1e-5
        book, report = codebook.fit((sample - mean) / deviation, labelling.clusters, seed=context.recipe.seed)
        # The codebook is moved to the teacher's own scale, so that one affine map of a frame finds its unit.
        tensors = {"centroids": book.centroids.numpy(), "mean": mean, "deviation": deviation}
        workspace.write_bytes(labelling.codebook, save(tensors))
        context.progress.say(f"teacher's codebook: {report}")
    teacher = ray.put(load(workspace.read_bytes(labelling.codebook)))
    done = set(workspace.list(labelling.targets))
    # Of a corpus that was another, or cut otherwise, when an attempt was killed.
    for stale in done - {labelling.file(shard) for shard in found}:
        workspace.delete(stale)
    missing = [asdict(shard) for shard in found if labelling.file(shard) not in done]
    with context.progress.count("teacher: labelling", len(found), "shards", done=len(found) - len(missing)) as counter:
        if missing:
            labelled = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                TeacherLabels,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
                fn_constructor_args=(workspace, context.recipe, labelling, teacher),
                **actors,
            )
            for _ in labelled.iter_rows():
                counter.advance()


def _asked(workspace: Any, found: list[Shard], seed: int) -> list[Shard]:
    """The shards that the sample is of: of more than it has clips, as many with a training clip, drawn by the seed."""
    import numpy as np
    import pyarrow.compute as pc

    if len(found) <= _SAMPLED_CLIPS:
        return found

    @cache
    def learnt(file: str) -> Any:
        return pc.not_equal(workspace.read_rows(file, columns=["split"])["split"], "heldout")

    drawn = (found[number] for number in np.random.default_rng(seed).permutation(len(found)))
    trained = (shard for shard in drawn if pc.any(learnt(shard.file).slice(shard.first, shard.count)).as_py())
    return list(islice(trained, _SAMPLED_CLIPS)) or found[:1]


def _training_rows(workspace: Any, shard: Shard) -> list[dict[str, Any]]:
    rows = workspace.read_rows(shard.file, shard.first, shard.count).to_pylist()
    return [row for row in rows if row["split"] != "heldout" and not row.get("stranger")]


def _clips(workspace: Any, shard: Shard, longest: float) -> Iterator[tuple[bytes, Any]]:
    """FLAC bytes and samples of the shard's training clips."""
    from speechgpt.speech import audio

    for row, wave in shards.decoded(_training_rows(workspace, shard), longest):
        # A manifest may have a column `audio` that holds anything.
        yield audio.encode(wave, "flac") if "path" in row else row["audio"], wave


class TeacherSample:
    """Teacher frames of a few clips of a shard."""

    def __init__(self, workspace: Any, recipe: Any, labelling: Labelling, asked: int) -> None:
        """asked: how many shards give frames."""
        self._workspace, self._recipe = workspace, recipe
        self._clips = max(1, _SAMPLED_CLIPS // asked)
        self._frames = _SPARE * recipe.encoder.training.teacher.frames / asked
        self._teacher = _teacher(workspace, recipe, labelling)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        part = Shard(**shard)
        rows = _training_rows(self._workspace, part)
        draw = np.random.default_rng(self._recipe.seed)
        drawn = (rows[number] for number in draw.permutation(len(rows)))
        most = math.ceil(self._frames / max(1, min(self._clips, len(rows))))
        kept = []
        for _, wave in islice(shards.decoded(drawn, self._recipe.data.max_seconds), self._clips):
            frames = self._teacher.frames(wave)
            kept.append(frames if len(frames) <= most else draw.permutation(frames)[:most])
        frames = np.concatenate(kept or [np.zeros((0, 1), np.float32)])
        return {
            "shard": part.name,
            "frames": frames.astype(np.float32).tobytes(),
            "dimensions": frames.shape[1],
        }


class TeacherLabels:
    """Writes a shard's clips with the teacher's unit of each frame."""

    def __init__(self, workspace: Any, recipe: Any, labelling: Labelling, teacher: Any) -> None:
        import ray
        import torch

        from speechgpt.speech.codebook import Codebook

        tensors = ray.get(teacher)
        self._workspace, self._labelling = workspace, labelling
        self._teacher = _teacher(workspace, recipe, labelling)
        self._max_seconds = recipe.data.max_seconds
        self._mean, self._deviation = tensors["mean"], tensors["deviation"]
        self._codebook = Codebook(torch.from_numpy(tensors["centroids"].copy()))

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import pyarrow as pa
        import torch

        from speechgpt.speech.audio import SAMPLE_RATE

        rows = []
        part = Shard(**shard)
        for flac, wave in _clips(self._workspace, part, self._max_seconds):
            frames = torch.from_numpy((self._teacher.frames(wave) - self._mean) / self._deviation)
            targets = self._codebook.assign(frames).numpy().astype("int16")
            rows.append({"audio": flac, "targets": targets, "seconds": len(wave) / SAMPLE_RATE})
        schema = pa.schema({"audio": pa.binary(), "targets": pa.list_(pa.int16()), "seconds": pa.float64()})
        self._workspace.write_table(self._labelling.file(part), pa.Table.from_pylist(rows, schema), GROUP_ROWS)
        return {"clips": len(rows)}


def _teacher(workspace: Any, recipe: Any, labelling: Labelling) -> Any:
    """What gives `frames(wave)`, in an actor."""
    import torch

    from speechgpt.speech.teacher import HubertTeacher, open_teacher

    torch.set_num_threads(1)
    device = recipe.resources.tokenisation.device
    if not labelling.encoder:
        return open_teacher(recipe.encoder.training.teacher, device)
    with workspace.fetch(labelling.encoder) as directory:
        return HubertTeacher(directory, device)
