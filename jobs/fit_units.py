"""Job `fit-units`: fit the codebook on frames of the training clips, or take one that is there.

Reads `speech/`, the recordings and `encoder/`. Writes `encoder/kmeans.safetensors` and `reports/units.json`: inertia
and its course (a curve in MLflow), dead units, how evenly the units are used, and units a second.

Frames lie on the disks of the nodes that made them, and each pass brings only sums to the driver, so that memory is
that of one batch however many frames there are (4 x dimensions bytes a frame on disk: 3 GB a million of HuBERT Base's).
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.parquet as pq

from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.speech.codebook import Codebook

_KMEANS = "encoder/kmeans.safetensors"
_REPORT = "reports/units.json"
_SHIPPED = "package:bundles/nano/encoder/kmeans.safetensors"
_FRAMES_A_SECOND = 50
_TASK_SECONDS = 60.0
"""Sound that one task turns into frames."""
_AHEAD = 2
"""Tasks that an actor knows of: it never waits, and a corpus is not a list of pending tasks."""


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
    # A group's frames stay with the actor of its number, so that sums are formed in the same order each time.
    actors = [actor.remote(workspace, recipe) for _ in range(min(pool.max_actors, len(groups)))]
    queues = [iter(range(first, len(groups), len(actors))) for first in range(len(actors))]
    counts: dict[int, int] = {}
    waiting: dict[Any, tuple[int, int]] = {}

    def send(place: int) -> None:
        if (group := next(queues[place], None)) is not None:
            waiting[actors[place].keep.remote(group, groups[group])] = place, group

    with context.progress.count("frames of the codebook", len(groups), "batches") as counter:
        for place in [*range(len(actors))] * _AHEAD:
            send(place)
        while waiting:
            (done, *_), _ = ray.wait([*waiting], num_returns=1)
            place, group = waiting.pop(done)
            counts[group] = ray.get(done)
            counter.advance()
            send(place)
    limits = _within([counts[n] for n in range(len(groups))], recipe.codebook.frames)
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
        context.progress.say(f"fitting {recipe.codebook.clusters} units on {sum(limits)} frames of {len(clips)} clips")
        book, report = _fit(context, actors, limits)
        for number, inertia in enumerate(report["inertia_course"]):
            context.run.log_metrics({"inertia": inertia}, step=number)
    used = ray.get([each.use.remote(book.centroids.numpy()) for each in actors])
    ray.get([each.forget.remote() for each in actors])
    for worker in actors:
        ray.kill(worker)
    report |= summary(np.sum([counts for counts, _ in used], axis=0), sum(runs for _, runs in used))
    report |= {"clips": len(clips), "speakers": len({clip.speaker for clip in clips})}
    with tempfile.TemporaryDirectory() as folder:
        workspace.write_bytes(_KMEANS, Path(book.save(folder)).read_bytes())
    workspace.write_json(_REPORT, report)
    return {"figures": {k: v for k, v in report.items() if not isinstance(v, list)}, "outputs": [_KMEANS, _REPORT]}


def _fit(context: Context, actors: list[Any], limits: list[int]) -> tuple["Codebook", dict[str, Any]]:
    """k-means over the frames that the actors keep. limits: how many of each group's frames take part."""
    import numpy as np
    import ray

    from speechgpt.speech import kmeans_passes
    from speechgpt.speech.codebook import start_sample

    section, seed = context.recipe.codebook, context.recipe.seed
    total = sum(limits)
    order = start_sample(total, section.clusters, seed)
    drawn = np.sort(order)
    firsts = np.cumsum([0, *limits[:-1]])
    groups = np.searchsorted(firsts, drawn, side="right") - 1
    owners = groups % len(actors)
    asked = [
        actor.take.remote(groups[owners == number], (drawn - firsts[groups])[owners == number])
        for number, actor in enumerate(actors)
    ]
    # In the order in which they were drawn: k-means++ then starts where `codebook.fit` would.
    places = np.concatenate([np.flatnonzero(owners == number) for number in range(len(actors))])
    sampled = np.concatenate(ray.get(asked))[np.argsort(places)][np.searchsorted(drawn, order)]

    def one_pass(centroids: "np.ndarray") -> kmeans_passes.Partial:
        shared = ray.put(centroids)
        return kmeans_passes.added(ray.get([each.partial.remote(limits, shared) for each in actors]))

    with context.progress.count("passes of k-means", section.iterations, "passes") as counter:
        return kmeans_passes.fit(
            kmeans_passes.start(sampled, section.clusters, seed),
            one_pass,
            section.iterations,
            float(sampled.var(0).mean()),
            counter.advance,
        )


def _within(counts: list[int], most: int) -> list[int]:
    """How many frames of each group take part, so that they are `most` together."""
    limits = []
    for count in counts:
        limits.append(min(count, most))
        most -= limits[-1]
    return limits


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


def summary(counts: "np.ndarray", runs: int) -> dict[str, Any]:
    """How the codebook is used on whole clips: shares, entropy, units a second.

    counts: frames of each unit, int [K]. runs: merged units.
    """
    import numpy as np

    shares = counts / counts.sum()
    used = shares[shares > 0]
    return {
        "unused_units": int((counts == 0).sum()),
        "entropy_bits": float(-(used * np.log2(used)).sum()),
        "units_per_second": float(runs / counts.sum() * _FRAMES_A_SECOND),
        "shares": [round(float(share), 8) for share in shares],
    }


class Featurizer:
    """One actor: the encoder's frames of clips, on this node's disk, and what k-means asks about them."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe") -> None:
        import torch

        from speechgpt.speech.hubert import HubertFeatures
        from speechgpt.training import node_local

        torch.set_num_threads(max(1, int(recipe.resources.tokenisation.cpus)))
        self._workspace = workspace
        self._longest = recipe.data.max_seconds
        self._budget = recipe.encoder.batch_seconds
        with workspace.fetch("encoder") as directory:
            self._features = HubertFeatures.load(directory)
        # If this process is killed, the next one on this node removes it.
        self._folder = node_local.scratch("frames")
        self._clips: dict[int, list[int]] = {}

    def keep(self, group: int, clips: list[Clip]) -> int:
        """Make and keep the frames of a group's clips that can be decoded (`tokenize` reports the others); how many."""
        import numpy as np

        features = self._heard(clips)
        self._clips[group] = [len(frames) for frames in features]
        joined = np.concatenate(features) if features else np.zeros((0, self._features.dimensions), np.float32)
        np.save(self._file(group), joined)
        return len(joined)

    def take(self, groups: "np.ndarray", numbers: "np.ndarray") -> "np.ndarray":
        """Frames by their groups, int [n] in order, and their numbers there, int [n]: float32 [n, dimensions]."""
        import numpy as np

        found = [np.zeros((0, self._features.dimensions), np.float32)]
        for group in np.unique(groups):
            found.append(np.load(self._file(group), mmap_mode="r")[numbers[groups == group]])
        return np.concatenate(found)

    def partial(self, limits: list[int], centroids: "np.ndarray") -> Any:
        """This actor's part of a pass. limits: how many of each group's frames take part."""
        import numpy as np

        from speechgpt.speech import kmeans_passes

        kept = (np.load(self._file(group), mmap_mode="r")[: limits[group]] for group in sorted(self._clips))
        return kmeans_passes.partial(kept, np.array(centroids))

    def use(self, centroids: "np.ndarray") -> "tuple[np.ndarray, int]":
        """How often each unit is that of a frame, int [K], and how many merged units the clips have."""
        import numpy as np

        return _used(
            centroids,
            (
                frames
                for group, lengths in sorted(self._clips.items())
                for frames in np.split(np.load(self._file(group)), np.cumsum(lengths)[:-1])
                if len(frames)
            ),
        )

    def forget(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, group: int) -> Path:
        return self._folder / f"{group}.npy"

    def _heard(self, clips: list[Clip]) -> "list[np.ndarray]":
        """float32 [frames, dimensions] of each clip. clips: in order."""
        from jobs.shards import decoded
        from speechgpt.speech.encoder import frames_of_each

        waves = []
        for file, of_file in groupby(clips, key=lambda clip: clip.file):
            rows = [clip.row for clip in of_file]
            table = self._workspace.read_rows(file, rows[0], rows[-1] - rows[0] + 1)
            chosen = table.take([number - rows[0] for number in rows]).to_pylist()
            waves += [wave for _, wave in decoded(chosen, self._longest)]
        return [frames.numpy() for frames in frames_of_each(self._features, waves, self._budget)]


def _used(centroids: "np.ndarray", clips: "Iterable[np.ndarray]") -> "tuple[np.ndarray, int]":
    import numpy as np
    import torch

    from speechgpt.speech.codebook import Codebook
    from speechgpt.speech.units import merge

    book = Codebook(torch.from_numpy(np.array(centroids)))
    counts, runs = np.zeros(book.clusters, np.int64), 0
    for frames in clips:
        assigned = book.assign(torch.from_numpy(frames)).numpy()
        counts += np.bincount(assigned, minlength=book.clusters)
        runs += len(merge(assigned).units)
    return counts, runs


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
