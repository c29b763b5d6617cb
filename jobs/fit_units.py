"""Job `fit-units`: fit the codebook on frames of the training clips, or take one that is there.

Reads `speech/`, the recordings and `encoder/`. Writes `encoder/kmeans.safetensors` and `reports/units.json`: inertia
and its course (a curve in MLflow), dead units, how evenly the units are used, and units a second.

Frames lie in the object stores of the nodes that made them, which put on disk what they cannot hold, and each pass
brings only sums to the driver, so that memory is that of a few groups however many frames there are (4 x dimensions
bytes a frame on disk: 3 GB a million of HuBERT Base's). Frames of a lost node are made again elsewhere, by Ray. Groups
are formed, and their sums added, in one order, whoever works on them: the same seed gives the same bytes.
"""

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from importlib import resources
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

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
_GROUP_SECONDS = 300.0
"""Sound that one task turns into frames. A pass brings the sums of each group to the driver, so they must be far fewer
bytes than its frames: a fifth with 1000 units."""
_AHEAD = 16
"""Tasks on groups that are under way, at least."""

_Kept: TypeAlias = "tuple[np.ndarray, np.ndarray]"
"""Of a group: its frames, float32 [frames, dimensions], and how many each clip has, int64 [clips]."""


class Clip(NamedTuple):
    """Where a clip's sound is: row `row` of the workspace's table `file`."""

    file: str
    row: int
    id: str
    speaker: str
    seconds: float


class _Group(NamedTuple):
    """Frames of one group of clips, in the object store of the node that made them."""

    clips: Any
    """Reference of the clips: it must be there for Ray to make the frames of a lost node again."""
    kept: Any
    """Reference of the frames and of the clips' lengths, as `Featurizer.heard` returns them."""
    lengths: Sequence[int]
    """How many frames each clip has."""

    @property
    def frames(self) -> int:
        return sum(self.lengths)


def run(context: Context) -> dict[str, Any]:
    import numpy as np
    import ray

    from speechgpt.speech import codebook

    recipe, workspace = context.recipe, context.workspace
    # In the order of the files, so that a task reads few of them.
    found = training_clips(workspace, recipe.data.max_seconds)
    clips = sorted(sample(found, recipe.codebook.frames, recipe.seed))
    if not clips:
        raise JobError(
            f"{workspace.uri}: no training clip of at most data.max_seconds in speech/ or "
            "manifest/utterances.parquet; run manifest and synthesize"
        )
    groups = _heard(context, clips)
    lengths = chain.from_iterable(group.lengths for group in groups)
    used = [clip for clip, length in zip(clips, lengths, strict=True) if length]
    if not used:
        raise JobError(f"{workspace.uri}: none of the {len(clips)} training clips drawn can be decoded")
    groups = [group for group in groups if group.frames]
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
        context.progress.say(f"fitting {recipe.codebook.clusters} units on frames of {len(used)} clips")
        book, report = _fit(context, groups)
        for number, inertia in enumerate(report["inertia_course"]):
            context.run.log_metrics({"inertia": inertia}, step=number)
    shared = ray.put(book.centroids.numpy())
    said = list(_each(_use, [(group.kept, shared) for group in groups]))
    report |= summary(np.sum([counts for counts, _ in said], axis=0), sum(runs for _, runs in said))
    report |= {"clips": len(used), "speakers": len({clip.speaker for clip in used})}
    with tempfile.TemporaryDirectory() as folder:
        workspace.write_bytes(_KMEANS, Path(book.save(folder)).read_bytes())
    workspace.write_json(_REPORT, report)
    return {"figures": {k: v for k, v in report.items() if not isinstance(v, list)}, "outputs": [_KMEANS, _REPORT]}


def _heard(context: Context, clips: list[Clip]) -> list[_Group]:
    """Groups of the clips, in order, with their frames; any number of the actors that are wanted is enough for it.

    Not by Ray Data's pool of actors: it forgets what they were made with, so that Ray could not start one again later,
    when a node is lost with frames that passes need.
    """
    import ray

    from jobs.shards import runs
    from speechgpt.runtime import cluster

    recipe = context.recipe
    cluster.connect(recipe.resources)
    bounds = runs([clip.seconds for clip in clips], _GROUP_SECONDS)
    groups = [_Group(ray.put(clips[first : first + count]), None, ()) for first, count in bounds]
    pool = recipe.resources.tokenisation
    actor: Any = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_task_retries=-1)(Featurizer)
    actors = [actor.remote(context.workspace, recipe) for _ in range(min(pool.max_actors, len(groups)))]
    # One that the cluster has no room for is never ready, and the others do its work.
    busy: dict[Any, tuple[Any, int | None]] = {each.ready.remote(): (each, None) for each in actors}
    del actors
    todo = iter(range(len(groups)))
    with context.progress.count("frames of the codebook", len(groups), "groups") as counter:
        while counter.done < len(groups):
            (found, *_), _ = ray.wait([*busy], num_returns=1)
            each, done = busy.pop(found)
            lengths = ray.get(found)
            if done is not None:
                groups[done] = groups[done]._replace(lengths=lengths)
                counter.advance()
            if (number := next(todo, None)) is not None:
                kept, counted = each.heard.options(num_returns=2).remote(groups[number].clips)
                groups[number] = groups[number]._replace(kept=kept)
                busy[counted] = each, number
            else:
                # Those for whom nothing is left go: one that lost its node with a group in hand may have their place.
                busy = {reference: (other, last) for reference, (other, last) in busy.items() if last is not None}
            del each
    return groups


def _fit(context: Context, groups: list[_Group]) -> tuple["Codebook", dict[str, Any]]:
    """k-means over the groups' frames."""
    import numpy as np
    import ray

    from speechgpt.speech import kmeans_passes
    from speechgpt.speech.codebook import start_sample

    section, seed = context.recipe.codebook, context.recipe.seed
    limits = _within([group.frames for group in groups], section.frames)
    firsts = np.cumsum([0, *limits])
    order = start_sample(int(firsts[-1]), section.clusters, seed)
    drawn = np.sort(order)
    parts = np.split(drawn, np.searchsorted(drawn, firsts[1:-1]))
    asked = [(group.kept, part - first) for group, part, first in zip(groups, parts, firsts[:-1], strict=True)]
    # In the order in which they were drawn: k-means++ then starts where `codebook.fit` would.
    sampled = np.concatenate([*_each(_taken, asked)])[np.searchsorted(drawn, order)]

    def one_pass(centroids: "np.ndarray") -> kmeans_passes.Partial:
        shared = ray.put(centroids)
        calls = [(group.kept, limit, shared) for group, limit in zip(groups, limits, strict=True) if limit]
        # One after the other: what a floating-point sum is depends on the order, and the driver holds two at a time.
        return reduce(lambda total, part: kmeans_passes.added([total, part]), _each(_partial, calls))

    with context.progress.count("passes of k-means", section.iterations, "passes") as counter:
        return kmeans_passes.fit(
            kmeans_passes.start(sampled, section.clusters, seed),
            one_pass,
            section.iterations,
            float(sampled.var(0).mean()),
            counter.advance,
        )


def _each(work: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
    """What `work` gives for each of the calls, in their order. Ray runs a task where its frames lie; enough for all
    processors are under way, and what they give does not pile up."""
    import ray

    task, ahead = ray.remote(num_cpus=1)(work), max(_AHEAD, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for call in calls:
        waiting.append(task.remote(*call))
        if len(waiting) > ahead:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


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
    turns = zip_longest(*(by_speaker[speaker] for speaker in sorted(by_speaker)))
    for clip in filter(None, chain.from_iterable(turns)):
        if held * _FRAMES_A_SECOND >= frames:
            break
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
    """One actor: the encoder, which turns groups of clips into frames."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe") -> None:
        import torch

        from speechgpt.speech.hubert import HubertFeatures

        torch.set_num_threads(max(1, int(recipe.resources.tokenisation.cpus)))
        self._workspace = workspace
        self._longest = recipe.data.max_seconds
        self._budget = recipe.encoder.batch_seconds
        with workspace.fetch("encoder") as directory:
            self._features = HubertFeatures.load(directory, device=recipe.resources.tokenisation.device)

    def ready(self) -> None:
        """Answered when the actor is there."""

    def heard(self, clips: list[Clip]) -> tuple[_Kept, list[int]]:
        """Frames of the clips, and how many each has."""
        import numpy as np

        features = self._heard(clips)
        lengths = [len(frames) for frames in features]
        return (np.concatenate(features), np.array(lengths, np.int64)), lengths

    def _heard(self, clips: list[Clip]) -> "list[np.ndarray]":
        """float32 [frames, dimensions] of each clip, none of one that cannot be decoded: `tokenize` reports it.

        clips: in order.
        """
        import numpy as np

        from jobs.shards import decoded
        from speechgpt.speech.encoder import frames_of_each

        waves: list[np.ndarray | None] = []
        for file, of_file in groupby(clips, key=lambda clip: clip.file):
            rows = [clip.row for clip in of_file]
            table = self._workspace.read_rows(file, rows[0], rows[-1] - rows[0] + 1)
            chosen = table.take([number - rows[0] for number in rows]).to_pylist()
            waves += [next((wave for _, wave in decoded([row], self._longest)), None) for row in chosen]
        found = iter(frames_of_each(self._features, [wave for wave in waves if wave is not None], self._budget))
        none = np.zeros((0, self._features.dimensions), np.float32)
        return [none if wave is None else next(found).numpy() for wave in waves]


def _taken(kept: _Kept, numbers: "np.ndarray") -> "np.ndarray":
    """A group's frames by their numbers, int [n]: float32 [n, dimensions]."""
    return kept[0][numbers]


def _partial(kept: _Kept, limit: int, centroids: "np.ndarray") -> Any:
    """A group's part of a pass. limit: how many of its frames take part."""
    import numpy as np
    import torch

    from speechgpt.speech import kmeans_passes

    torch.set_num_threads(1)
    return kmeans_passes.partial([kept[0][:limit]], np.array(centroids))


def _use(kept: _Kept, centroids: "np.ndarray") -> "tuple[np.ndarray, int]":
    """How often each unit is that of a frame, int [K], and how many merged units the group's clips have."""
    import numpy as np

    frames, lengths = kept
    return _used(centroids, (np.array(part) for part in np.split(frames, np.cumsum(lengths)[:-1]) if len(part)))


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


def training_clips(workspace: "Workspace", longest: float) -> list[Clip]:
    """Clips of known length, of at most `longest` seconds, that training may hear."""
    files = [name for name in workspace.list("speech") if name.endswith(".parquet")]
    files += [name for name in ["manifest/utterances.parquet"] if workspace.exists(name)]
    clips = []
    for file in files:
        columns = ["id", "speaker", "seconds", "split"]
        table = pq.read_table(workspace.root(file), columns=columns, filesystem=workspace.fs)
        for row, (name, speaker, seconds, split) in enumerate(
            zip(*(table[c].to_pylist() for c in columns), strict=True)
        ):
            if split == "train" and seconds and seconds <= longest:
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
