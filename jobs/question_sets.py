"""Question sets inside the jobs `manifest` and `instructions`: files read, dialogues kept or refused, and counted."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from jobs.published_rows import names
from jobs.shell import JobError

if TYPE_CHECKING:
    from speechgpt.language.config import QuestionsSection
    from speechgpt.language.conversations import AskedTurn, Conversation, Pair
    from speechgpt.language.instructions import Refusal
    from speechgpt.recipe import Recipe

_KIND = "question"
"""Kind of what is refused of a question set, since it is no row yet."""


@dataclass
class QuestionSets:
    """What the files of `instructions.questions` hold.

    counts: of each file its `file`, the `rows` in it, those that became `chains`, those that are `text_only` because
    every answer is too long to be spoken, and the `refused` by reason; the three add up to the rows.
    """

    kept: "list[Conversation]" = field(default_factory=list)
    refused: "list[Refusal]" = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def earlier(self, recipe: "Recipe") -> "dict[str, tuple[Pair, ...]]":
        """{id of a turn: what was said before it}, for those turns of dialogues that have something."""
        section, longest = recipe.instructions.questions, recipe.instructions.max_answer_words
        turns = (turn for talk in self.kept for turn in talk.asked(section.history, longest))
        return {turn.id: turn.earlier for turn in turns if turn.earlier}


def read(recipe: "Recipe") -> QuestionSets:
    """Every file, in order; the same for the same recipe and files.

    Raises JobError for a file that cannot be read, or when more than `data.max_bad_fraction` of its rows are no
    dialogues.
    """
    from speechgpt.language import conversations
    from speechgpt.language.instructions import Refusal
    from speechgpt.language.question_filter import QuestionFilter

    section, longest = recipe.instructions.questions, recipe.instructions.max_answer_words
    sets, judge = QuestionSets(), QuestionFilter(section)
    for file, name in zip(section.files, names(section.files), strict=True):
        rows, kept, text_only = 0, 0, 0
        refused: Counter[str] = Counter()
        first = ""
        for number, row in _rows(file):
            rows += 1
            source, where = f"{name}-{number}", f"{file}, row {number}"
            try:
                talk = conversations.read(row, section, source, name)
            except conversations.ConversationError as error:
                refused["unreadable"] += 1
                sets.refused.append(Refusal(source, _KIND, "unreadable", f"{where}: {error}"))
                first = first or f"{where}: {error}"
                continue
            if reason := judge.reason(talk):
                refused[reason] += 1
                sets.refused.append(Refusal(source, _KIND, reason, where))
                continue
            spoken = next(talk.asked(0, longest), None) is not None
            kept, text_only = kept + spoken, text_only + (not spoken)
            sets.kept.append(talk)
        if refused["unreadable"] > recipe.data.max_bad_fraction * rows:
            raise JobError(
                f"instructions.questions: {refused['unreadable']} of {rows} rows cannot be used, more than "
                f"data.max_bad_fraction = {recipe.data.max_bad_fraction:g} allows. The first: {first}"
            )
        counts = {"rows": rows, "chains": kept, "text_only": text_only, "refused": dict(sorted(refused.items()))}
        sets.counts[name] = {"file": file, **counts}
    return sets


def check(file: str, section: "QuestionsSection") -> None:
    """Raise JobError unless the file is there and its first row is a dialogue."""
    from speechgpt.language import conversations

    for number, row in _rows(file):
        try:
            conversations.read(row, section, "", "")
        except conversations.ConversationError as error:
            raise JobError(f"instructions.questions: {file}, row {number}: {error}") from None
        return
    raise JobError(f"instructions.questions: {file} has no rows")


def to_speak(recipe: "Recipe") -> "list[tuple[AskedTurn, Conversation, str]]":
    """The turns that the recipe's voices are to speak, each with its dialogue and language; empty if another way is
    chosen. A language is the row's own, or else the set's; empty if neither is known."""
    section = recipe.instructions.questions
    if not section.files or section.spoken_by != "voices":
        return []
    longest = recipe.instructions.max_answer_words
    return [
        (turn, talk, talk.language or section.language or "")
        for talk in read(recipe).kept
        for turn in talk.asked(section.history, longest)
    ]


def spoken_sections(recipe: "Recipe") -> tuple[str, ...]:
    """Parts of the recipe that `to_speak` depends on."""
    section = recipe.instructions.questions
    if not section.files or section.spoken_by != "voices":
        return ()
    return ("instructions.questions", "instructions.max_answer_words")


def spoken_files(recipe: "Recipe") -> tuple[str, ...]:
    section = recipe.instructions.questions
    return section.files if section.spoken_by == "voices" else ()


def _rows(file: str) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row); of JSON Lines the number of the line. A line that is no JSON is None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from speechgpt.runtime.recordings import open_binary

    try:
        with open_binary(file) as stream:
            if file.endswith(".parquet"):
                number = 0
                for batch in pq.ParquetFile(stream).iter_batches(1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, _without_nulls(row)
                return
            lines = _unpacked(stream) if file.endswith(".gz") else stream
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(line)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise JobError(f"instructions.questions: {file} cannot be read: {error}") from None


def _unpacked(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(stream) as lines:
        yield from lines


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A Parquet row as JSON would have it: keys without a value are not there."""
    return {key: value for key, value in row.items() if value is not None}
