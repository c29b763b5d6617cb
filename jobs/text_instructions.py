"""Text-only instructions inside the job `instructions`: files read, rows kept or refused, and counted."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from jobs.shell import JobError

if TYPE_CHECKING:
    from speechgpt.language.instructions import Refusal, WrittenQuestion
    from speechgpt.recipe import Recipe


@dataclass
class TextInstructions:
    """What the files of `instructions.text_instructions` hold.

    counts: of each file its `rows`, those `kept`, and the `refused` by reason; the two add up to the rows.
    """

    kept: "list[WrittenQuestion]" = field(default_factory=list)
    refused: "list[Refusal]" = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read(recipe: "Recipe") -> TextInstructions:
    """Every file, in order, but for what `instructions.questions` refuses. Raises JobError naming file and line."""
    from speechgpt.language.conversations import Conversation
    from speechgpt.language.instructions import Refusal
    from speechgpt.language.question_filter import QuestionFilter

    found, judge = TextInstructions(), QuestionFilter(recipe.instructions.questions, spoken=False)
    for file in recipe.instructions.text_instructions:
        rows, refused = read_file(file), Counter[str]()
        for row in rows:
            if reason := judge.reason(Conversation(row.id, row.category, ((row.question, row.answer),))):
                refused[reason] += 1
                found.refused.append(Refusal(row.id, "text", reason, file))
            else:
                found.kept.append(row)
        counts = {"rows": len(rows), "kept": len(rows) - refused.total(), "refused": dict(sorted(refused.items()))}
        found.counts[file] = counts
    return found


def read_file(file: str) -> "list[WrittenQuestion]":
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
