"""Job `fit-units`: fit the codebook on frames of the training clips, or take one that is there.

Reads `speech/`, the recordings and `encoder/`. Writes `encoder/kmeans.safetensors` and `reports/units.json`: inertia,
dead units, how evenly the units are used, and units a second.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq

from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

_KMEANS = "encoder/kmeans.safetensors"
_REPORT = "reports/units.json"
_SHIPPED = "package:bundles/nano/encoder/kmeans.safetensors"
_FRAMES_A_SECOND = 50
_TASK_SECONDS = 60.0
"""Sound that one task turns into frames."""


class Clip(NamedTuple):
    """Where a clip's sound is: row `row` of the workspace's table `file`."""

    file: str
    row: int
    id: str
    speaker: str
    seconds: float


def run(context: Context) -> dict[str, Any]:
    import numpy as np
    import ray
    from ray.util import ActorPool

    from jobs.shards import runs
    from speechgpt.runtime import cluster
    from speechgpt.speech import codebook

    recipe, workspace = context.recipe, context.workspace
    # In the order of the files, so that a task reads few of them.
    clips = sorted(sample(training_clips(workspace), recipe.codebook.frames, recipe.seed))
    if not clips:
        raise JobError(
            f"{workspace.uri}: no training clip in speech/ or manifest/utterances.parquet; run manifest and synthesize"
        )
    groups = [clips[first : first + count] for first, count in runs([c.seconds for c in clips], _TASK_SECONDS)]
    cluster.connect(recipe.resources)
    pool = recipe.resources.tokenisation
    actor: Any = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus)(Featurizer)
    actors = [actor.remote(workspace, recipe) for _ in range(min(pool.max_actors, len(groups)))]
    features: list[np.ndarray] = []
    with context.progress.count("frames of the codebook", len(groups), "batches") as counter:
        # `map` keeps the order of the groups, so that the fit sees the same frames in the same order each time.
        for each in ActorPool(actors).map(lambda worker, group: worker.features.remote(group), groups):
            features += each
            counter.advance()
    for worker in actors:
        ray.kill(worker)
    frames = np.concatenate(features)[: recipe.codebook.frames]
    report: dict[str, Any] = {}
    if recipe.codebook.init == "shipped":
        book = codebook.Codebook.load(str(resources.files("speechgpt") / "bundles" / "nano" / "encoder"))
    elif recipe.codebook.init != "fit":
        book = codebook.Codebook.load(recipe.codebook.init)
        if book.clusters != recipe.codebook.clusters:
            raise JobError(
                f"codebook.clusters: {recipe.codebook.clusters}, but {recipe.codebook.init} has {book.clusters} units"
            )
    else:
        context.progress.say(f"fitting {recipe.codebook.clusters} units on {len(frames)} frames of {len(clips)} clips")
        book, report = codebook.fit(
            frames, recipe.codebook.clusters, seed=recipe.seed, iterations=recipe.codebook.iterations
        )
    report |= usage(book, features) | {"clips": len(clips), "speakers": len({clip.speaker for clip in clips})}
    with tempfile.TemporaryDirectory() as folder:
        workspace.write_bytes(_KMEANS, Path(book.save(folder)).read_bytes())
    workspace.write_json(_REPORT, report)
    return {"figures": {k: v for k, v in report.items() if not isinstance(v, list)}, "outputs": [_KMEANS, _REPORT]}


def sample(clips: Sequence[Clip], frames: int, seed: int) -> list[Clip]:
    """Whole clips, drawn by the seed and turn by turn from every speaker, until they hold `frames` frames.

    A rare speaker weighs as much as a common one: units must not spell who is speaking.
    """
    by_speaker: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda c: hashlib.sha256(f"{seed}:{c.id}".encode()).digest()):
        by_speaker.setdefault(clip.speaker, []).append(clip)
    drawn: list[Clip] = []
    held = 0.0
    for turn in zip_longest(*(by_speaker[speaker] for speaker in sorted(by_speaker))):
        for clip in turn:
            if clip is not None and held * _FRAMES_A_SECOND < frames:
                drawn.append(clip)
                held += clip.seconds
    return drawn


def usage(book: Any, features: "list[np.ndarray]") -> dict[str, Any]:
    """How the codebook is used on whole clips, float32 [frames, dimensions] each: shares, entropy, units a second."""
    import numpy as np
    import torch

    from speechgpt.speech.units import merge

    assigned = [book.assign(torch.from_numpy(np.array(clip))).numpy() for clip in features]
    counts = np.bincount(np.concatenate(assigned), minlength=book.clusters)
    shares = counts / counts.sum()
    used = shares[shares > 0]
    merged = sum(len(merge(frames).units) for frames in assigned)
    return {
        "unused_units": int((counts == 0).sum()),
        "entropy_bits": float(-(used * np.log2(used)).sum()),
        "units_per_second": float(merged / counts.sum() * _FRAMES_A_SECOND),
        "shares": [round(float(share), 8) for share in shares],
    }


class Featurizer:
    """One actor: the encoder's frames of clips."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe") -> None:
        import torch

        from speechgpt.speech.hubert import HubertFeatures

        torch.set_num_threads(max(1, int(recipe.resources.tokenisation.cpus)))
        self._workspace = workspace
        self._longest = recipe.data.max_seconds
        self._budget = recipe.encoder.batch_seconds
        with workspace.fetch("encoder") as directory:
            self._features = HubertFeatures.load(directory)

    def features(self, clips: list[Clip]) -> "list[np.ndarray]":
        """float32 [frames, dimensions] of each clip that can be decoded; `tokenize` reports the others."""
        from speechgpt.runtime.recordings import sound_of
        from speechgpt.speech import audio
        from speechgpt.speech.encoder import frames_of_each

        waves = []
        tables = {file: self._workspace.read_table(file) for file in {clip.file for clip in clips}}
        for clip in clips:
            row = tables[clip.file].slice(clip.row, 1).to_pylist()[0]
            try:
                waves.append(audio.decode(sound_of(row), max_seconds=self._longest))
            except (audio.AudioError, OSError):
                continue
        return [frames.numpy() for frames in frames_of_each(self._features, waves, self._budget)]


def training_clips(workspace: "Workspace") -> list[Clip]:
    """Clips of known length that training may hear."""
    files = [name for name in workspace.list("speech") if name.endswith(".parquet")]
    files += [name for name in ["manifest/utterances.parquet"] if workspace.exists(name)]
    clips = []
    for file in files:
        columns = ["id", "speaker", "seconds", "split"]
        table = pq.read_table(workspace.root(file), columns=columns, filesystem=workspace.fs)
        for row, (name, speaker, seconds, split) in enumerate(
            zip(*(table[c].to_pylist() for c in columns), strict=True)
        ):
            if split == "train" and seconds:
                clips.append(Clip(file, row, name, speaker or "", seconds))
    return clips


def _files(recipe: "Recipe") -> list[str]:
    """The codebook that is taken as it is, if one is."""
    init = recipe.codebook.init
    return [] if init == "fit" else [_SHIPPED if init == "shipped" else f"{init}/kmeans.safetensors"]


JOB = Job(
    name="fit-units",
    part="encoder",
    run=run,
    reads=("manifest", "synthesize", "train-encoder"),
    sections=("codebook", "data"),
    files=_files,
)
main = command(JOB)

if __name__ == "__main__":
    main()
