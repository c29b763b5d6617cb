"""Job `instructions`: units, questions and text instructions become training rows.

Reads `units/`, the recipe's world and `instructions.text_instructions`. Writes `instructions/rows.parquet` (a
directory: one part a shard of units, one for what is text alone), `instructions/questions.parquet` and
`instructions/report.json`.
Held-out questions and stranger voices stay out of the rows.

What travels through Ray are names of shards: a task reads its shard of units and writes its rows itself, under the
shard's name, so that a job that was killed goes on where it was and ends in the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    from speechgpt.language.instructions import Refusal, Row, RowBuilder, Utterance, WrittenQuestion
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

ROWS = "instructions/rows.parquet"
QUESTIONS = "instructions/questions.parquet"
REPORT = "instructions/report.json"
ROW_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "kind", "prefix", "plain_text", "category", "split")])
_TALLY = b"tally"
"""Metadata of a part that says what it holds and what was refused: a killed job need not count again."""


def run(context: Context) -> dict[str, Any]:
    import ray.data

    from jobs import ray_data
    from speechgpt.language import world
    from speechgpt.language.instructions import WrittenQuestion

    recipe, workspace = context.recipe, context.workspace
    shards = [name for name in workspace.list("units") if name.endswith(".parquet")]
    if not shards:
        raise JobError(f"{workspace.uri}: units/ is empty; run tokenize first")
    made = world.load(recipe.world, recipe.seed)
    questions = [*made.questions(), *made.outside()]
    written = [WrittenQuestion(q.id, q.category, q.question, q.answer) for q in questions if q.split == "train"]
    for file in recipe.instructions.text_instructions:
        written += read_instructions(file)
    builder = builder_of(recipe, workspace, written)
    text_part = part_of("text.parquet")
    write_part(workspace, text_part, (item for each in written for item in builder.of_question(each)))

    missing = [shard for shard in shards if not workspace.exists(part_of(shard))]
    if missing:
        ray_data.connect(recipe.resources)
        build = partial(_build_shard, workspace=workspace, shared=ray.put(builder), voice=recipe.voices.answer)
        to_do = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        done = len(shards) - len(missing)
        with context.progress.count("building instructions", len(shards), "shards", done) as counter:
            for _ in to_do.map(build).iter_rows():
                counter.advance()
    report = total(tally_of(workspace, part) for part in [text_part, *map(part_of, shards)])
    if not report["rows"].get("transcribe"):
        raise JobError(
            f"{workspace.uri}: no clip in units/ is for training and has a text, so there is nothing to learn from"
        )
    workspace.write_table(QUESTIONS, pa.Table.from_pylist([asdict(question) for question in questions]))
    workspace.write_json(REPORT, report)
    return {"figures": report, "outputs": [ROWS, QUESTIONS, REPORT]}


def read_instructions(file: str) -> "list[WrittenQuestion]":
    """Text instructions, one JSON object `instruction, response` (and perhaps `id`, `category`) a line, local or s3://.

    Raises JobError naming file and line.
    """
    from speechgpt.language.instructions import WrittenQuestion
    from speechgpt.runtime.recordings import read_bytes

    name = PurePosixPath(file).stem
    try:
        lines = read_bytes(file).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"instructions.text_instructions: {file} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["instruction"].strip(), row["response"].strip()
        except (ValueError, TypeError, KeyError, AttributeError):
            question = answer = ""
        if not question or not answer:
            raise JobError(
                f"{file}, line {number}: a JSON object with the texts `instruction` and `response` is expected"
            )
        found.append(
            WrittenQuestion(str(row.get("id", f"{name}-{number}")), row.get("category", name), question, answer)
        )
    return found


def builder_of(recipe: "Recipe", workspace: "Workspace", written: "Sequence[WrittenQuestion]") -> "RowBuilder":
    from speechgpt.language.instructions import RowBuilder
    from speechgpt.language.prompts import PromptFormat

    return RowBuilder(
        PromptFormat.of(recipe.language),
        recipe.instructions,
        recipe.seed,
        spoken_answers(workspace, recipe.voices.answer),
        tuple(written) if recipe.instructions.multi_turn else (),
    )


def spoken_answers(workspace: "Workspace", voice: str) -> dict[str, tuple[int, ...]]:
    """Units of the answer voice for every training text that it speaks; of several clips the first by id."""
    import pyarrow.dataset

    columns = ["utterance_id", "units", "text", "split", "voice", "speaker", "stranger"]
    table = pyarrow.dataset.dataset(workspace.root("units"), filesystem=workspace.fs).to_table(columns)
    clips = [clip for clip in table.to_pylist() if is_for_training(clip) and speaks(clip, voice)]
    return {
        clip["text"].strip(): tuple(clip["units"])
        for clip in sorted(clips, key=lambda clip: clip["utterance_id"], reverse=True)
        if clip["text"]
    }


def is_for_training(clip: Mapping[str, Any]) -> bool:
    return clip["split"] == "train" and not clip["stranger"]


def speaks(clip: Mapping[str, Any], voice: str) -> bool:
    """Whether a clip is in this voice: a synthetic one by its key, a recorded one by its speaker."""
    return voice in (clip["voice"], clip["speaker"])


def part_of(shard: str) -> str:
    """The part of the rows that comes from this shard of units."""
    return f"{ROWS}/{PurePosixPath(shard).name}"


def utterance(clip: Mapping[str, Any], voice: str) -> "Utterance":
    """A row of the units table as the builder takes it."""
    from speechgpt.language.instructions import Utterance

    return Utterance(
        clip["utterance_id"],
        tuple(clip["units"]),
        clip["text"] or "",
        clip["category"] or "",
        clip["answer"] or "",
        speaks(clip, voice),
    )


def write_part(workspace: "Workspace", part: str, made: "Iterable[Row | Refusal]") -> None:
    """Write rows as one part, with a tally of them and of what was refused."""
    from speechgpt.language.instructions import Row, tally

    items = list(made)
    table = pa.Table.from_pylist([item._asdict() for item in items if isinstance(item, Row)], ROW_SCHEMA)
    workspace.write_table(part, table.replace_schema_metadata({_TALLY: json.dumps(tally(items))}))


def tally_of(workspace: "Workspace", part: str) -> dict[str, dict[str, int]]:
    return json.loads(pq.read_schema(workspace.root(part), filesystem=workspace.fs).metadata[_TALLY])


def total(tallies: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Tallies added up."""
    sums: dict[str, Counter[str]] = {"rows": Counter(), "refused": Counter()}
    for each in tallies:
        for key, counts in each.items():
            sums[key].update(counts)
    return {key: dict(sorted(counts.items())) for key, counts in sums.items()}


def _build_shard(row: dict[str, Any], workspace: "Workspace", shared: Any, voice: str) -> dict[str, Any]:
    import ray

    # By reference, the builder with all spoken answers is copied to each node once and not to each task.
    write_part(workspace, part_of(row["shard"]), _rows_of(workspace, row["shard"], ray.get(shared), voice))
    return row


def _rows_of(workspace: "Workspace", shard: str, builder: "RowBuilder", voice: str) -> "Iterator[Row | Refusal]":
    for clip in workspace.read_table(shard).to_pylist():
        if is_for_training(clip) and clip["units"]:
            yield from builder.of_utterance(utterance(clip, voice))


JOB = Job(
    name="instructions",
    part="instructions",
    run=run,
    reads=("tokenize",),
    sections=("world", "instructions", "language.dialect", "language.prefix", "voices.answer"),
    files=lambda recipe: recipe.instructions.text_instructions,
    partial=(ROWS,),
)
main = command(JOB)

if __name__ == "__main__":
    main()
