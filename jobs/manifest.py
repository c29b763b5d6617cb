"""Job `manifest`: check the recordings that come in, and list the sentences that the voices are to speak.

Reads the shipped recordings, `data.extra_manifests` and the question sets that voices are to speak. Writes
`manifest/utterances.parquet`, `manifest/prompts.parquet` and, for rows that cannot be used,
`quarantine/manifest.parquet`.
"""

from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jobs import question_sets
from jobs.shell import Context, Job, JobError, command
from speechgpt.evaluation.normaliser import words
from speechgpt.recipe import Recipe
from speechgpt.runtime.recordings import PACKAGE, ManifestError, Recordings, read_manifests

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
    }
)
_QUARANTINE = "quarantine/manifest.parquet"
_SHOWN_PROBLEMS = 5
_QUESTIONS_FOR_ONE_OUTSIDE = 12
"""Questions of the world for each one that it has no answer to."""


def run(context: Context) -> dict[str, Any]:
    recipe, workspace = context.recipe, context.workspace
    workspace.delete(_QUARANTINE)
    try:
        recordings = read_manifests(sources(recipe))
    except ManifestError as error:
        raise JobError(str(error)) from None
    if recordings.problems:
        workspace.write_table(_QUARANTINE, recordings.quarantine())
    refuse_too_many(recordings, recipe.data.max_bad_fraction, workspace.path(_QUARANTINE))
    if recipe.data.spoken_text:
        recordings.rows = [{**row, "text": row["text"] and " ".join(words(row["text"]))} for row in recordings.rows]
    prompts = prompts_of(recipe)
    workspace.write_table("manifest/utterances.parquet", recordings.table())
    workspace.write_table("manifest/prompts.parquet", prompts)
    figures = {
        "recordings": len(recordings.rows),
        "recordings_without_text": sum(row["text"] is None for row in recordings.rows),
        "recorded_seconds": round(sum(row["seconds"] or 0 for row in recordings.rows), 2),
        "quarantined": len(recordings.problems),
        "prompts": prompts.num_rows,
        "held_out_prompts": prompts.column("split").to_pylist().count("heldout"),
    }
    outputs = ["manifest/utterances.parquet", "manifest/prompts.parquet"]
    return {"figures": figures, "outputs": outputs + ([_QUARANTINE] if recordings.problems else [])}


def sources(recipe: Recipe) -> list[str]:
    """The manifests that a recipe names, the shipped recordings first."""
    shipped = [f"{PACKAGE}recordings/manifest.jsonl"] if recipe.data.shipped_recordings else []
    return shipped + list(recipe.data.extra_manifests)


def refuse_too_many(recordings: Recordings, limit: float, where: str) -> None:
    """Raise JobError if more than `limit` of the rows were set aside, showing the first of them."""
    bad, total = len(recordings.problems), len(recordings.problems) + len(recordings.rows)
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
        Question(turn.id, category, turn.question, turn.answer, "train")
        for turn, category in question_sets.to_speak(recipe)
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


JOB = Job(
    name="manifest",
    part="manifest",
    run=run,
    sections=lambda recipe: (
        *("data", "world", "voices", "evaluation.questions"),
        *question_sets.spoken_sections(recipe),
    ),
    files=lambda recipe: [*sources(recipe), *question_sets.spoken_files(recipe)],
)
main = command(JOB)

if __name__ == "__main__":
    main()
