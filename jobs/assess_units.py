"""Job `assess-units`: how good the units are, beside those of MFCCs and of the teacher, each with as many clusters.

espeak speaks held-out questions in several voices and says when each phoneme sounds; the corpus' own recordings are
heard, too. Reads `manifest/`, `speech/` and `encoder/`; writes `reports/unit_quality.json`: phone purity, cluster
purity, PNMI, dead units, units a second, and how much the units of one text differ between speakers; of the recordings
what can be known of them, and in words what cannot. No part of the pipeline: nothing else depends on it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobs.shards import RECORDINGS, decoded
from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

_REPORT = "reports/unit_quality.json"
_VOICES = ("en-us+m3", "en-us+f2", "en+m1", "en-gb-x-rp+f4")
_TEXTS = 60
_RECORDINGS = 240
"""Of the corpus that are heard."""
_FRAMES = 60_000
"""Frames of training clips that the codebooks of MFCCs and teacher are fitted on."""
_FRAMES_A_SECOND = 50


def run(context: Context) -> dict[str, Any]:
    import ray

    from speechgpt.runtime import cluster

    recipe, workspace = context.recipe, context.workspace
    questions, rows = _questions(recipe), _recordings(workspace, recipe.seed)
    if not questions and not rows:
        raise JobError(f"{workspace.uri}: no held-out question in recipe {recipe.name}'s world, and no recording")
    cluster.connect(recipe.resources)
    assess: Any = ray.remote(num_cpus=1)(_assess)
    kinds = ["encoder", "mfcc", "teacher"] if recipe.encoder.training.teacher.kind == "whisper" else ["encoder", "mfcc"]
    pending = {kind: assess.remote(workspace, recipe, kind, rows) for kind in kinds}
    report: dict[str, Any] = {}
    with context.progress.count("assessing units", len(kinds), "encoders") as counter:
        for kind, result in pending.items():
            report[kind] = ray.get(result)
            counter.advance()
    report["not_measured"] = _not_measured(questions, rows, report["encoder"])
    workspace.write_json(_REPORT, report)
    return {"figures": report, "outputs": [_REPORT]}


def _assess(workspace: "Workspace", recipe: "Recipe", kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the report, in a Ray task. rows: the recordings to hear."""
    from dataclasses import asdict

    import numpy as np
    import torch

    from speechgpt.evaluation.unit_quality import agreement
    from speechgpt.speech.codebook import Codebook
    from speechgpt.speech.voices import aligned

    torch.set_num_threads(1)
    listen = _listener(workspace, recipe, kind)
    with workspace.fetch("encoder") as directory:
        book = Codebook.load(directory)
    if kind != "encoder":
        book = _fitted(workspace, recipe, listen, book.clusters)

    def heard(wave: np.ndarray) -> np.ndarray:
        return book.assign(torch.from_numpy(np.array(listen(wave)))).numpy()

    row: dict[str, Any] = {}
    units: list[int] = []
    phones: list[str] = []
    clips: list[tuple[str | None, str | None, np.ndarray]] = []
    for question in _questions(recipe):
        for voice in _VOICES:
            wave, sounding = aligned(question, voice)
            found = heard(wave)
            frames = min(len(found), len(sounding))
            units += found[:frames].tolist()
            phones += sounding[:frames]
            clips.append((question, voice, found))
    if clips:
        row = asdict(agreement(units, phones)) | _use(clips, book.clusters)
    own = decoded(rows, recipe.data.max_seconds)
    if clips := [(_said(each), each["speaker"], heard(wave)) for each, wave in own]:
        row["recordings"] = {"clips": len(clips), **_use(clips, book.clusters)}
    return row


def _use(clips: "Sequence[tuple[str | None, str | None, np.ndarray]]", clusters: int) -> dict[str, float]:
    """How clips use the units, and how much two speakers of one text differ, where there are such.

    clips: (text, speaker, the unit of every frame) of each.
    """
    import numpy as np

    from speechgpt.evaluation.unit_quality import speaker_variance, usage
    from speechgpt.speech.units import merge

    frames = np.concatenate([found for _, _, found in clips]).tolist()
    merged = [merge(found).units.tolist() for _, _, found in clips]
    told = {(text, speaker): units for (text, speaker, _), units in zip(clips, merged, strict=True) if text and speaker}
    differ = speaker_variance(told)
    return {
        **usage(frames, clusters),
        "units_per_second": sum(map(len, merged)) / len(frames) * _FRAMES_A_SECOND,
        **({} if differ is None else {"speaker_variance": differ}),
    }


def _not_measured(questions: list[str], rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, str]:
    """{what: why not}. row: the report's of the encoder."""
    missing = {}
    if not questions:
        missing["agreement with phones"] = (
            "the recipe's world has no held-out question to speak, and recordings do not say when each phone sounds"
        )
    if "recordings" not in row:
        missing["recordings"] = "none of those drawn can be decoded" if rows else "the manifest has none"
    elif "speaker_variance" not in row["recordings"]:
        missing["speaker variance of recordings"] = "no two named speakers say the same text in them"
    return missing


def _questions(recipe: "Recipe") -> list[str]:
    """Held-out questions of the recipe's world."""
    from speechgpt.language import world
    from speechgpt.language.script import spread

    held_out = [q for q in world.load(recipe.world, recipe.seed).questions() if q.split == "heldout"]
    return [each.question for each in spread(held_out, _TEXTS, recipe.seed)]


def _recordings(workspace: "Workspace", seed: int) -> list[dict[str, Any]]:
    """Recordings to hear, drawn by the seed: first those of a text that several speakers say, then those that training
    has not heard."""
    if not workspace.exists(RECORDINGS):
        return []
    rows = workspace.read_table(RECORDINGS).to_pylist()
    speakers: dict[str | None, set[str | None]] = defaultdict(set)
    for row in rows:
        speakers[_said(row)].add(row["speaker"])

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        said = _said(row)
        shared = said if said and len(speakers[said] - {None}) > 1 else None
        return shared is None, _drawn(seed, shared or ""), row["split"] == "train", _drawn(seed, row["id"])

    return sorted(rows, key=place)[:_RECORDINGS]


def _said(row: dict[str, Any]) -> str | None:
    """A recording's words, so that the same are equal; None if they are not known."""
    from speechgpt.language.normaliser import words

    return " ".join(words(row["text"] or "")) or None


def _drawn(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _listener(workspace: "Workspace", recipe: "Recipe", kind: str) -> Any:
    """wave -> float32 [frames, dimensions]"""
    from speechgpt.speech.config import TeacherSection
    from speechgpt.speech.hubert import HubertFeatures
    from speechgpt.speech.teacher import open_teacher

    if kind == "encoder":
        with workspace.fetch("encoder") as directory:
            features = HubertFeatures.load(directory, device="cpu")
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
    found = training_clips(workspace, recipe.data.max_seconds)
    for clip in sorted(sample(found, min(_FRAMES, recipe.codebook.frames), recipe.seed)):
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
    reads=("manifest", "synthesize", "fit-units"),
    sections=("encoder.training.teacher", "codebook", "world"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
