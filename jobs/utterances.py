"""What is asked of those who are examined: held-out clips of a workspace, of a recipe, or a manifest's recordings."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.shell import JobError
from speechgpt.recipe import Recipe
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.evaluation.listening import Utterance


def workspace_utterances(workspace: Workspace) -> list["Utterance"]:
    """Held-out spoken questions of every voice, and the held-out recordings that have a text."""
    from pyarrow import dataset

    from speechgpt.evaluation.listening import Utterance

    found = []
    if workspace.exists("speech"):
        speech = dataset.dataset(workspace.root("speech"), filesystem=workspace.fs)
        held_out = (dataset.field("role") == "question") & (dataset.field("split") == "heldout")
        for row in speech.to_table(filter=held_out).to_pylist():
            known = (row["speaker"], row["text"], row["answer"], row["category"])
            found.append(Utterance(row["id"], "stranger" if row["stranger"] else "seen", *known, sound=row["audio"]))
    if workspace.exists("manifest/utterances.parquet"):
        found += _recorded(workspace.read_table("manifest/utterances.parquet").to_pylist())
    return sorted(found, key=lambda utterance: utterance.id)


def _recorded(rows: Sequence[dict[str, Any]]) -> "Iterator[Utterance]":
    """The recordings with a text that training did not hear."""
    from speechgpt.evaluation.listening import Utterance
    from speechgpt.runtime.recordings import read_bytes

    for row in rows:
        if row["split"] != "train" and row["text"]:
            known = (row["speaker"] or "", row["text"], row["answer"], "recording")
            yield Utterance(row["id"], "recording", *known, sound=read_bytes(row["path"]))


def manifest_utterances(manifest: str, limit: float) -> list["Utterance"]:
    """Every usable row of a manifest. Raises JobError for one that cannot be used, or with too many bad rows."""
    from jobs.manifest import refuse_too_many
    from speechgpt.evaluation.listening import Utterance
    from speechgpt.runtime.recordings import ManifestError, read_bytes, read_manifests

    try:
        recordings = read_manifests([manifest])
    except ManifestError as error:
        raise JobError(str(error)) from None
    refuse_too_many(recordings, limit, manifest)
    return [
        Utterance(
            id=row["id"],
            group="manifest",
            speaker=row["speaker"] or "",
            text=row["text"],
            answer=row["answer"],
            category=row.get("category") or "",
            sound=read_bytes(row["path"]),
        )
        for row in recordings.rows
    ]


def spoken_held_out(recipe: Recipe, workspace: Workspace, progress: Progress) -> list["Utterance"]:
    """The recipe's held-out questions by every voice, in the same samples that its own pipeline judges, and its
    held-out recordings, if they are here."""
    import pyarrow.compute as pc

    from jobs.manifest import prompts_of, sources
    from jobs.synthesize import speak
    from speechgpt.runtime.recordings import ManifestError, read_manifests

    prompts = prompts_of(recipe)
    speak(prompts.filter(pc.equal(prompts["split"], "heldout")), recipe, workspace, progress)
    recordings = []
    for source in sources(recipe):
        try:
            recordings += read_manifests([source]).rows
        except ManifestError as error:
            progress.say(f"evaluated without the recordings of {source}: {error}")
    return sorted([*workspace_utterances(workspace), *_recorded(recordings)], key=lambda utterance: utterance.id)
