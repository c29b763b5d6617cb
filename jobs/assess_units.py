"""Job `assess-units`: how good the units are, beside those of MFCCs and of the teacher, each with as many clusters.

espeak speaks held-out questions in several voices and says when each phoneme sounds. Reads `speech/` and `encoder/`;
writes `reports/unit_quality.json`: phone purity, cluster purity, PNMI, dead units, units a second, and how much the
units of one text differ between speakers. No part of the pipeline: nothing else depends on it.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobs.shell import Context, Job, command

if TYPE_CHECKING:
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

_REPORT = "reports/unit_quality.json"
_VOICES = ("en-us+m3", "en-us+f2", "en+m1", "en-gb-x-rp+f4")
_TEXTS = 60
_FRAMES = 60_000
"""Frames of training clips that the codebooks of MFCCs and teacher are fitted on."""
_FRAMES_A_SECOND = 50


def run(context: Context) -> dict[str, Any]:
    import ray

    from speechgpt.runtime import cluster

    recipe, workspace = context.recipe, context.workspace
    cluster.connect(recipe.resources)
    assess: Any = ray.remote(num_cpus=1)(_assess)
    kinds = ["encoder", "mfcc", "teacher"] if recipe.encoder.training.teacher.kind == "whisper" else ["encoder", "mfcc"]
    pending = {kind: assess.remote(workspace, recipe, kind) for kind in kinds}
    report = {}
    with context.progress.count("assessing units", len(kinds), "encoders") as counter:
        for kind, result in pending.items():
            report[kind] = ray.get(result)
            counter.advance()
    workspace.write_json(_REPORT, report)
    return {"figures": report, "outputs": [_REPORT]}


def _assess(workspace: "Workspace", recipe: "Recipe", kind: str) -> dict[str, float]:
    """One row of the report, in a Ray task."""
    from dataclasses import asdict

    import numpy as np
    import torch

    from speechgpt.evaluation.unit_quality import agreement, speaker_variance, usage
    from speechgpt.language import world
    from speechgpt.language.script import spread
    from speechgpt.speech.codebook import Codebook
    from speechgpt.speech.units import merge
    from speechgpt.speech.voices import aligned

    torch.set_num_threads(1)
    listen = _listener(workspace, recipe, kind)
    with workspace.fetch("encoder") as directory:
        book = Codebook.load(directory)
    if kind != "encoder":
        book = _fitted(workspace, recipe, listen, book.clusters)
    held_out = [q for q in world.load(recipe.world, recipe.seed).questions() if q.split == "heldout"]
    units: list[int] = []
    phones: list[str] = []
    clips: dict[tuple[str, str], list[int]] = {}
    for question in spread(held_out, _TEXTS, recipe.seed):
        for voice in _VOICES:
            wave, sounding = aligned(question.question, voice)
            found = book.assign(torch.from_numpy(np.array(listen(wave)))).numpy()
            frames = min(len(found), len(sounding))
            units += found[:frames].tolist()
            phones += sounding[:frames]
            clips[question.question, voice] = merge(found).units.tolist()
    merged = sum(map(len, clips.values()))
    return {
        **asdict(agreement(units, phones)),
        **usage(units, book.clusters),
        "units_per_second": merged / len(units) * _FRAMES_A_SECOND,
        "speaker_variance": speaker_variance(clips) or 0.0,
    }


def _listener(workspace: "Workspace", recipe: "Recipe", kind: str) -> Any:
    """wave -> float32 [frames, dimensions]"""
    from speechgpt.speech.config import TeacherSection
    from speechgpt.speech.hubert import HubertFeatures
    from speechgpt.speech.teacher import open_teacher

    if kind == "encoder":
        with workspace.fetch("encoder") as directory:
            features = HubertFeatures.load(directory)
        return lambda wave: features([wave])[0].numpy()
    return open_teacher(TeacherSection(kind="mfcc") if kind == "mfcc" else recipe.encoder.training.teacher).frames


def _fitted(workspace: "Workspace", recipe: "Recipe", listen: Any, clusters: int) -> Any:
    """A codebook on frames of the training clips that `fit-units` would draw, standardised as distillation does."""
    import numpy as np
    import torch

    from jobs.fit_units import sample, training_clips
    from speechgpt.runtime.recordings import sound_of
    from speechgpt.speech import audio, codebook

    frames: list[np.ndarray] = []
    # Clips come file by file.
    table = lru_cache(maxsize=1)(workspace.read_table)
    for clip in sorted(sample(training_clips(workspace), min(_FRAMES, recipe.codebook.frames), recipe.seed)):
        row = table(clip.file).slice(clip.row, 1).to_pylist()[0]
        try:
            frames.append(listen(audio.decode(sound_of(row), max_seconds=recipe.data.max_seconds)))
        except (audio.AudioError, OSError):
            continue
    heard = np.concatenate(frames)
    mean, deviation = heard.mean(0), heard.std(0) + 1e-5
    book, _ = codebook.fit((heard - mean) / deviation, clusters, seed=recipe.seed)
    return _Standardised(book.centroids, torch.from_numpy(mean), torch.from_numpy(deviation))


class _Standardised:
    """A codebook whose frames are brought to zero mean and unit variance first."""

    def __init__(self, centroids: Any, mean: Any, deviation: Any) -> None:
        from speechgpt.speech.codebook import Codebook

        self._book, self._mean, self._deviation = Codebook(centroids), mean, deviation
        self.clusters = self._book.clusters

    def assign(self, frames: Any) -> Any:
        return self._book.assign((frames - self._mean) / self._deviation)


JOB = Job(
    name="assess-units",
    part="reports",
    run=run,
    reads=("synthesize", "fit-units"),
    sections=("encoder.training.teacher", "codebook", "world"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
