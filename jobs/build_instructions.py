"""Job `instructions`: units, questions, text instructions and published files become training rows.

Reads `units/`, the recipe's world, `instructions.text_instructions`, `instructions.questions` and
`instructions.published`. Writes
`instructions/rows.parquet` (a directory: one part a shard of units, one a range of a published file or of question
sets, one for what is text alone), `instructions/refused.parquet` (the ids of what no row was made from, and why),
`instructions/questions.parquet` and `instructions/report.json`.
Held-out clips and stranger voices stay out of the rows; the report counts them, so that each clip of `units/` is in one
of its `clips`.

What travels through Ray are names of shards and ranges of lines: a task reads its own and writes its rows itself,
under a name that says where they are from, so that a job that was killed goes on where it was and ends in the same
bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import published_rows, question_sets, spoken_questions, text_instructions, train_text_to_unit
from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    from jobs.published_rows import PublishedPart
    from jobs.question_sets import QuestionSets
    from speechgpt.interop.instruction_rows import PublishedRows
    from speechgpt.language.conversations import Pair
    from speechgpt.language.instructions import Refusal, Row, RowBuilder, Utterance, WrittenQuestion
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

ROWS = "instructions/rows.parquet"
REFUSED = "instructions/refused.parquet"
QUESTIONS = "instructions/questions.parquet"
REPORT = "instructions/report.json"
ROW_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "kind", "prefix", "plain_text", "category", "split")])
REFUSED_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "kind", "reason", "detail")])
_TALLY = b"tally"
"""Metadata of a part that says what it holds and what was refused: a killed job need not count again."""
_UNREADABLE = "unreadable"
_CLIP = "clip: "
"""What the refusals of whole clips are counted under."""
_REFUSED_QUESTIONS = "questions-refused.parquet"
"""A part without rows, whose tally says what was refused of the question sets before any row was made."""


def run(context: Context) -> dict[str, Any]:
    from speechgpt.language import world
    from speechgpt.language.instructions import WrittenQuestion, total

    recipe, workspace = context.recipe, context.workspace
    made = world.load(recipe.world, recipe.seed)
    questions = [*made.questions(), *made.outside()]
    written = [WrittenQuestion(q.id, q.category, q.question, q.answer) for q in questions if q.split == "train"]
    if not recipe.instructions.own:
        written = []
    texts = text_instructions.read(recipe)
    sets = question_sets.read(recipe)
    own = _own_parts(context, [*written, *texts.kept], texts.refused, sets)
    parts = own + _question_parts(context, sets) + _published_parts(context)

    tallies = [tally_of(workspace, f"{ROWS}/{part}") for part in parts]
    report = total(tallies)
    if recipe.instructions.own:
        report["clips"] = _clips(total(tallies[: len(own)]))
    if recipe.instructions.own and not report["rows"].get("transcribe"):
        raise JobError(
            f"{workspace.uri}: no clip in units/ is for training and has a text, so there is nothing to learn from"
        )
    if not report["rows"]:
        raise JobError(f"{workspace.uri}: every row was refused; {workspace.path(REFUSED)} says why")
    if lines := _lines_of_files(tallies):
        report["published"] = lines
    if texts.counts:
        report["text_instructions"] = texts.counts
    if sets.counts:
        report["questions"] = sets.counts
    workspace.write_table(QUESTIONS, pa.Table.from_pylist([asdict(question) for question in questions]))
    workspace.write_json(REPORT, report)
    figures = {key: report[key] for key in ("clips", "rows", "refused") if key in report}
    refused = [REFUSED] if workspace.exists(REFUSED) else []
    return {"figures": figures, "outputs": [ROWS, *refused, QUESTIONS, REPORT]}


def _own_parts(
    context: Context, written: "Sequence[WrittenQuestion]", refused: "Sequence[Refusal]", sets: "QuestionSets"
) -> list[str]:
    """Rows of this run's units and of text, of which some were refused; the names of their parts."""
    import ray.data

    from jobs import ray_data

    recipe, workspace = context.recipe, context.workspace
    shards = [name for name in workspace.list("units") if name.endswith(".parquet")] if recipe.instructions.own else []
    if recipe.instructions.own and not shards:
        raise JobError(f"{workspace.uri}: units/ is empty; run tokenize first")
    builder = builder_of(recipe, workspace, written)
    write_part(
        workspace, "text.parquet", chain(refused, (item for each in written for item in builder.of_question(each)))
    )
    parts = {shard: PurePosixPath(shard).name for shard in shards}
    missing = [shard for shard, part in parts.items() if not workspace.exists(f"{ROWS}/{part}")]
    if missing:
        ray_data.connect(recipe.resources)
        shared = ray.put((builder, sets.earlier(recipe)))
        build = partial(_build_shard, workspace=workspace, shared=shared, voice=recipe.voices.answer)
        to_do = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        done = len(shards) - len(missing)
        with context.progress.count("building instructions", len(shards), "shards", done) as counter:
            for _ in to_do.map(build).iter_rows():
                counter.advance()
    return ["text.parquet", *parts.values()]


def _question_parts(context: Context, sets: "QuestionSets") -> list[str]:
    """Rows of the question sets, and what was refused of them; the names of their parts."""
    from jobs import ray_data

    recipe, workspace = context.recipe, context.workspace
    if not sets.counts:
        return []
    write_part(workspace, _REFUSED_QUESTIONS, sets.refused)
    parts = spoken_questions.plan(sets.kept, recipe)
    missing = [part for part in parts if not workspace.exists(f"{ROWS}/{part.name}")]
    if missing:
        ray_data.connect(recipe.resources)
        builder = builder_of(recipe, workspace, ())
        done = len(sets.kept) - sum(map(len, missing))
        with context.progress.count("speaking question sets", len(sets.kept), "dialogues", done) as counter:
            for count in spoken_questions.make(missing, sets.kept, recipe, workspace, builder, write_part):
                counter.advance(count)
    return [_REFUSED_QUESTIONS, *(part.name for part in parts)]


def _published_parts(context: Context) -> list[str]:
    """Rows of the published files; the names of their parts."""
    import ray.data

    from jobs import ray_data

    recipe, workspace, files = context.recipe, context.workspace, context.recipe.instructions.published
    if not files:
        return []
    _warn_of_other_form(context)
    with context.progress.count("looking through published files", None, "lines") as counter:
        parts = []
        for each in published_rows.plan(files):
            parts.append(each)
            counter.advance(each.range.lines)
    there = {PurePosixPath(name).name for name in workspace.list(ROWS)}
    done = [_outcome(workspace, each) for each in parts if each.part in there]
    groups = published_rows.tasks(each for each in parts if each.part not in there)
    lines = sum(each.range.lines for each in parts)
    if groups:
        ray_data.connect(recipe.resources)
        build = partial(
            _build_published, workspace=workspace, groups=ray.put(groups), made=published_rows.maker(recipe)
        )
        to_do = ray.data.from_items([{"group": n} for n in range(len(groups))], override_num_blocks=len(groups))
        finished = lines - sum(each.range.lines for group in groups for each in group)
        with context.progress.count("reading published files", lines, "lines", finished) as counter:
            for outcome in to_do.flat_map(build).iter_rows():
                done.append(outcome)
                counter.advance(outcome["lines"])
                published_rows.refuse_unreadable(done, lines, recipe.data.max_bad_fraction, workspace.path(REFUSED))
    published_rows.refuse_unreadable(done, lines, recipe.data.max_bad_fraction, workspace.path(REFUSED))
    return [each.part for each in parts]


def _warn_of_other_form(context: Context) -> None:
    section, language = context.recipe.instructions, context.recipe.language
    if not section.rewrite_published and (language.dialect, language.prefix) != ("released", "speechgpt"):
        context.progress.say(
            "instructions.published: rows stay as published (the released dialect, the prefix speechgpt), while this "
            f"recipe asks in the dialect {language.dialect} with the prefix {language.prefix or '(none)'}; "
            "instructions.rewrite_published=true writes them in the recipe's"
        )


def builder_of(recipe: "Recipe", workspace: "Workspace", written: "Sequence[WrittenQuestion]") -> "RowBuilder":
    from speechgpt.language.instructions import RowBuilder
    from speechgpt.language.prompts import PromptFormat

    return RowBuilder(
        PromptFormat.of(recipe.language),
        recipe.instructions,
        recipe.seed,
        # Without this run's own speech nothing is read of it, whatever lies there.
        spoken_answers(workspace, recipe.voices.answer) if recipe.instructions.own else {},
        tuple(written) if recipe.instructions.multi_turn else (),
    )


def spoken_answers(workspace: "Workspace", voice: str) -> dict[str, tuple[int, ...]]:
    """Units of the answer voice for every training text that it speaks; of several clips the first by id."""
    import pyarrow.dataset

    units = pyarrow.dataset.dataset(workspace.root("units"), filesystem=workspace.fs)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for batch in units.to_batches(columns=["utterance_id", "units", "text"], filter=learnt_from(voice)):
        for clip in batch.to_pylist():
            text, name = clip["text"].strip(), clip["utterance_id"]
            if text not in found or name < found[text][0]:
                found[text] = name, tuple(clip["units"])
    return {text: said for text, (_, said) in found.items()}


def learnt_from(voice: str | None) -> pc.Expression:
    """Which rows of the units table are not `left_out` and have a text, for reading no others.

    voice: of those it `speaks` alone.
    """
    trained = (pc.field("split") == "train") & ~pc.coalesce(pc.field("stranger"), False)
    wanted = trained & (pc.list_value_length(pc.field("units")) > 0) & (pc.field("text") != "")
    return wanted if voice is None else wanted & ((pc.field("voice") == voice) | (pc.field("speaker") == voice))


def left_out(clip: Mapping[str, Any]) -> str | None:
    """Why a clip of the units table is not learnt from: `stranger`, `held_out` or `no_units`; None if it is."""
    if clip["stranger"]:
        return "stranger"
    if clip["split"] != "train":
        return "held_out"
    return None if clip["units"] else "no_units"


def speaks(clip: Mapping[str, Any], voice: str) -> bool:
    """Whether a clip is in this voice: a synthetic one by its key, a recorded one by its speaker."""
    return voice in (clip["voice"], clip["speaker"])


def utterance(clip: Mapping[str, Any], voice: str, earlier: "tuple[Pair, ...]" = ()) -> "Utterance":
    """A row of the units table as the builder takes it. earlier: of a dialogue's question, what was said before."""
    from speechgpt.language.instructions import Utterance

    return Utterance(
        clip["utterance_id"],
        tuple(clip["units"]),
        clip["text"] or "",
        clip["category"] or "",
        clip["answer"] or "",
        speaks(clip, voice),
        earlier,
    )


def write_part(
    workspace: "Workspace", part: str, made: "Iterable[Row | Refusal]", published: Mapping[str, Any] | None = None
) -> None:
    """Write rows as one part, with a tally of them and of what was refused; the refusals as a part of their own.

    published: what is known about the lines that a published part is from; kept in the tally.
    """
    from speechgpt.language.instructions import Row, tally

    items = list(made)
    if refused := [item._asdict() for item in items if not isinstance(item, Row)]:
        workspace.write_table(f"{REFUSED}/{part}", pa.Table.from_pylist(refused, REFUSED_SCHEMA))
    table = pa.Table.from_pylist([item._asdict() for item in items if isinstance(item, Row)], ROW_SCHEMA)
    counted = tally(items) | ({"published": published} if published else {})
    # Last, since its presence says that the part is finished.
    workspace.write_table(f"{ROWS}/{part}", table.replace_schema_metadata({_TALLY: json.dumps(counted)}))


def write_published(workspace: "Workspace", group: "Sequence[PublishedPart]", made: "PublishedRows") -> None:
    """Write the parts of one task, one after the other."""
    from speechgpt.language.instructions import Row

    for each, lines in published_rows.rows_of(group, made):
        items = list(lines)
        kept = sum(isinstance(item, Row) for line in items for item in line)
        facts = {"file": each.file, "name": each.name, "lines": len(items), "kept": kept}
        write_part(workspace, each.part, chain.from_iterable(items), facts)


def tally_of(workspace: "Workspace", part: str) -> dict[str, dict[str, Any]]:
    return json.loads(pq.read_schema(workspace.root(part), filesystem=workspace.fs).metadata[_TALLY])


def _clips(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Of the clips in `units/`, those that rows were made from and those that were left out, by reason: each clip once.

    counts: of the parts that were made from clips, in each of which a clip has one row of its units alone.
    """
    left = {why.removeprefix(_CLIP): count for why, count in counts["refused"].items() if why.startswith(_CLIP)}
    return {"used": counts["rows"].get("units", 0), **left}


def _lines_of_files(tallies: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name in ids: its file, the lines in it that are not blank, those kept and those refused}."""
    files: dict[str, dict[str, Any]] = {}
    for each in tallies:
        if facts := each.get("published"):
            one = files.setdefault(facts["name"], {"file": facts["file"], "lines": 0, "kept": 0, "refused": 0})
            one["lines"] += facts["lines"]
            one["kept"] += facts["kept"]
            one["refused"] += facts["lines"] - facts["kept"]
    return files


def _outcome(workspace: "Workspace", part: "PublishedPart") -> dict[str, Any]:
    """What a finished part came to: its lines, and those that are no rows."""
    counts = tally_of(workspace, f"{ROWS}/{part.part}")
    bad = sum(count for why, count in counts["refused"].items() if why.endswith(_UNREADABLE))
    first = ""
    if bad:
        refused = workspace.read_table(f"{REFUSED}/{part.part}")
        first = next(row["detail"] for row in refused.to_pylist() if row["reason"] == _UNREADABLE)
    return {"lines": part.range.lines, "unreadable": bad, "first": first}


def _build_published(
    row: dict[str, Any], workspace: "Workspace", groups: Any, made: "PublishedRows"
) -> list[dict[str, Any]]:
    import ray

    group = ray.get(groups)[row["group"]]
    write_published(workspace, group, made)
    return [_outcome(workspace, each) for each in group]


def _build_shard(row: dict[str, Any], workspace: "Workspace", shared: Any, voice: str) -> dict[str, Any]:
    import ray

    # By reference, the builder with all spoken answers is copied to each node once and not to each task.
    builder, earlier = ray.get(shared)
    made = _rows_of(workspace, row["shard"], builder, voice, earlier)
    write_part(workspace, PurePosixPath(row["shard"]).name, made)
    return row


def _rows_of(
    workspace: "Workspace", shard: str, builder: "RowBuilder", voice: str, earlier: Mapping[str, "tuple[Pair, ...]"]
) -> "Iterator[Row | Refusal]":
    from speechgpt.language.instructions import Refusal

    for clip in workspace.read_table(shard).to_pylist():
        if reason := left_out(clip):
            yield Refusal(clip["utterance_id"], "clip", reason)
        else:
            yield from builder.of_utterance(utterance(clip, voice, earlier.get(clip["question_id"] or "", ())))


JOB = Job(
    name="instructions",
    part="instructions",
    run=run,
    reads=lambda recipe, argument: (
        *(("tokenize",) if recipe.instructions.own else ()),
        *(("train-text-to-unit",) if train_text_to_unit.is_needed(recipe) else ()),
    ),
    sections=lambda recipe: (
        "world",
        "instructions",
        "language.dialect",
        "language.prefix",
        "voices.answer",
        *published_rows.sections(recipe),
        *(("text_to_unit.beams", "text_to_unit.max_units") if train_text_to_unit.is_needed(recipe) else ()),
    ),
    files=lambda recipe: (
        *recipe.instructions.text_instructions,
        *recipe.instructions.questions.files,
        *recipe.instructions.published,
    ),
    partial=(ROWS, REFUSED),
)
main = command(JOB)

if __name__ == "__main__":
    main()
