"""Job `manifest`: check the recordings that come in, and list the sentences that the voices are to speak.

Reads the shipped recordings, `data.extra_manifests`, `corpora.sources` and the question sets that voices are to speak.
Writes `manifest/utterances.parquet`, `manifest/prompts.parquet`, for recordings with the same bytes
`manifest/same_sound.parquet`, and, for rows that cannot be used, `quarantine/manifest.parquet`. Many sound files are
looked at by Ray's workers, few by this process.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs import question_sets, shards
from jobs.shell import Context, Job, JobError, command
from speechgpt.language.normaliser import words
from speechgpt.recipe import Recipe
from speechgpt.runtime.config import ResourcesSection
from speechgpt.runtime.files import PACKAGE
from speechgpt.runtime.recordings import (
    ManifestError,
    Problem,
    Recordings,
    SoundFacts,
    inspect,
    read_manifests,
    same_sound,
)

PROMPT_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "voice": pa.string(),
        "role": pa.string(),
        "category": pa.string(),
        "question_id": pa.string(),
        "answer": pa.string(),
        "split": pa.string(),
        "stranger": pa.bool_(),
        "language": pa.string(),
    }
)
_QUARANTINE = "quarantine/manifest.parquet"
_SAME_SOUND = "manifest/same_sound.parquet"
_LOOKED_AT = "manifest/looked_at"
_FEW = 2000
"""Sound files that are looked at sooner than a cluster starts."""
_FILES_A_TASK = 500
_SHOWN_PROBLEMS, _SHOWN_SPLITS = 5, 20
_QUESTIONS_FOR_ONE_OUTSIDE = 12
"""Questions of the world for each one that it has no answer to."""


def run(context: Context) -> dict[str, Any]:
    recipe, workspace = context.recipe, context.workspace
    workspace.delete(_QUARANTINE)
    workspace.delete(_SAME_SOUND)
    try:
        recordings = read_manifests(sources(recipe), recipe.corpora.sources, lambda paths: _inspected(paths, context))
    except ManifestError as error:
        raise JobError(str(error)) from None
    alike = same_sound(recordings.table)
    if recipe.corpora.duplicate_audio == "quarantine":
        set_aside(recordings, alike)
    if recordings.problems:
        workspace.write_table(_QUARANTINE, recordings.quarantine())
    refuse_too_many(recordings, recipe.data.max_bad_fraction, workspace.path(_QUARANTINE))
    if recordings.unknown_splits:
        shown = ", ".join(repr(name) for name, _ in recordings.unknown_splits.most_common(_SHOWN_SPLITS))
        context.progress.say(
            f"{recordings.unknown_splits.total()} recordings are held out, of splits whose names say neither training "
            f"nor evaluation: {shown}"
        )
    prompts = prompts_of(recipe)
    utterances = _spoken_text(recordings.table) if recipe.data.spoken_text else recordings.table
    # So that a worker reads its shard and not the whole of it.
    workspace.write_table("manifest/utterances.parquet", utterances, group_rows=shards.GROUP_ROWS)
    if len(alike):
        workspace.write_table(_SAME_SOUND, alike)
    workspace.write_table("manifest/prompts.parquet", prompts)
    workspace.delete(_LOOKED_AT)
    figures = {
        "recordings": len(utterances),
        "recordings_without_text": utterances["text"].null_count,
        "recorded_seconds": round(_seconds(utterances), 2),
        **{split: _amount(utterances, split) for split in ("train", "heldout")},
        # Not as keys, which become names of metrics.
        "unknown_splits": [f"{name}: {count}" for name, count in recordings.unknown_splits.most_common(_SHOWN_SPLITS)],
        "quarantined": len(recordings.problems),
        "reasons": dict(Counter(problem.reason for problem in recordings.problems).most_common()),
        "same_sound": len(alike),
        "shards": sum(1 for _ in shards.of_recordings(utterances, recipe)),
        "prompts": prompts.num_rows,
        "held_out_prompts": prompts.column("split").to_pylist().count("heldout"),
    }
    outputs = ["manifest/utterances.parquet", "manifest/prompts.parquet"]
    outputs += ([_SAME_SOUND] if len(alike) else []) + ([_QUARANTINE] if recordings.problems else [])
    return {"figures": figures, "outputs": outputs}


def _amount(utterances: pa.Table, split: str) -> dict[str, float]:
    """Clips, and hours as far as their lengths are known."""
    rows = utterances.filter(pc.equal(utterances["split"], split))
    return {"clips": len(rows), "hours": round(_seconds(rows) / 3600, 4)}


def _seconds(rows: pa.Table) -> float:
    return pc.sum(rows["seconds"]).as_py() or 0.0


def _spoken_text(utterances: pa.Table) -> pa.Table:
    """With texts as they are spoken: words alone."""
    parts = [
        pa.array([text and " ".join(words(text)) for text in part.to_pylist()], pa.string())
        for part in utterances["text"].chunks
    ]
    place = utterances.schema.get_field_index("text")
    return utterances.set_column(place, utterances.schema.field(place), pa.chunked_array(parts, pa.string()))


def sources(recipe: Recipe) -> list[str]:
    """The manifests that a recipe names, the shipped recordings first."""
    shipped = [f"{PACKAGE}recordings/manifest.jsonl"] if recipe.data.shipped_recordings else []
    return shipped + list(recipe.data.extra_manifests)


def set_aside(recordings: Recordings, alike: pa.Table) -> None:
    """Move the rows that have the sound of another one from the rows to the problems."""
    twice = dict(zip(alike["id"].to_pylist(), alike["same_as"].to_pylist(), strict=True))
    again = pc.is_in(recordings.table["id"], alike["id"])
    recordings.problems += [
        Problem(row["path"], "same_sound", f"{row['id']}: the same bytes as {twice[row['id']]}")
        for row in recordings.table.select(["id", "path"]).filter(again).to_pylist()
    ]
    recordings.table = recordings.table.filter(pc.invert(again))


def _inspected(paths: list[str], context: Context) -> list[SoundFacts]:
    """`inspect`; what workers said is kept for the attempt that comes after one that was killed."""
    if len(paths) <= _FEW:
        return inspect(paths)
    workspace = context.workspace
    kept = f"{_LOOKED_AT}/{hashlib.sha256(json.dumps(paths).encode()).hexdigest()}.parquet"
    if not workspace.exists(kept):
        found = list(inspected_by_workers(paths, context.recipe.resources))
        workspace.write_table(kept, pa.Table.from_pylist([facts._asdict() for facts in found], _FACTS_SCHEMA))
        return found
    facts = [SoundFacts(**row) for row in workspace.read_table(kept).to_pylist()]
    # What could not be read may be there by now.
    lost = [number for number, fact in enumerate(facts) if fact.error is not None]
    for number, fact in zip(lost, inspect([paths[number] for number in lost]), strict=True):
        facts[number] = fact
    return facts


def inspected_by_workers(
    paths: list[str], resources: ResourcesSection, together: int = _FILES_A_TASK
) -> Iterator[SoundFacts]:
    """`inspect` on the cluster. together: files in one task."""
    import ray.data

    from jobs import ray_data

    ray_data.connect(resources)
    numbered = pa.table({"number": range(len(paths)), "path": paths})
    blocks = [numbered.slice(first, together) for first in range(0, len(paths), together)]
    looked_at = ray.data.from_arrow(blocks).map_batches(_look, batch_format="pyarrow", batch_size=None)
    facts: list[SoundFacts | None] = [None] * len(paths)
    # Tasks end in any order.
    for row in looked_at.iter_rows():
        number = row.pop("number")
        facts[number] = SoundFacts(**row)
    for path, fact in zip(paths, facts, strict=True):
        if fact is None:
            raise JobError(f"{path} was looked at by no worker; run the job again")
        yield fact


_FACTS_SCHEMA = pa.schema({"sha256": pa.string(), "seconds": pa.float64(), "rate": pa.int32(), "error": pa.string()})


def _look(batch: pa.Table) -> pa.Table:
    numbered = zip(inspect(batch["path"].to_pylist()), batch["number"].to_pylist(), strict=True)
    schema = _FACTS_SCHEMA.append(pa.field("number", pa.int64()))
    return pa.Table.from_pylist([{**facts._asdict(), "number": number} for facts, number in numbered], schema)


def refuse_too_many(recordings: Recordings, limit: float, where: str) -> None:
    """Raise JobError if more than `limit` of the rows were set aside, showing the first of them."""
    bad, total = len(recordings.problems), len(recordings.problems) + len(recordings.table)
    if bad > limit * total:
        shown = "\n".join(f"  {p.source}: {p.reason}: {p.detail}" for p in recordings.problems[:_SHOWN_PROBLEMS])
        raise JobError(
            f"{bad} of {total} manifest rows cannot be used, more than data.max_bad_fraction = {limit:g} allows; "
            f"all are in {where}. The first:\n{shown}"
        )


def prompts_of(recipe: Recipe) -> pa.Table:
    """What the recipe's voices are to speak (PROMPT_SCHEMA)."""
    from speechgpt.language import world
    from speechgpt.language.script import script, spread
    from speechgpt.language.world import Question

    made = world.load(recipe.world, recipe.seed)
    questions = made.questions()
    # A world cut short is asked as much less of what it does not know.
    outside = spread(made.outside(), len(questions) // _QUESTIONS_FOR_ONE_OUTSIDE, recipe.seed)
    more = [
        Question(turn.id, talk.category, turn.question, turn.answer, "train", language=language)
        for turn, talk, language in question_sets.to_speak(recipe)
    ]
    lines = script(
        questions + outside + more,
        made.readings(recipe.world.readings, recipe.seed),
        recipe.voices,
        held_out=recipe.evaluation.questions,
        seed=recipe.seed,
        word_lists=made.word_lists(recipe.world.word_lists, recipe.seed),
    )
    return pa.Table.from_pylist([asdict(line) for line in lines], PROMPT_SCHEMA)


def _sections(recipe: Recipe) -> tuple[str, ...]:
    """`corpora` only where something is in it: a run without is the run that it was before there was such a key."""
    corpora = ("corpora",) if recipe.corpora.model_fields_set else ()
    return ("data", "world", "voices", "evaluation.questions", *corpora, *question_sets.spoken_sections(recipe))


JOB = Job(
    name="manifest",
    part="manifest",
    run=run,
    sections=_sections,
    files=lambda recipe: [*sources(recipe), *question_sets.spoken_files(recipe)],
    trees=lambda recipe: [corpus.uri for corpus in recipe.corpora.sources],
    partial=(_LOOKED_AT,),
)
main = command(JOB)

if __name__ == "__main__":
    main()
