"""Question sets inside the job `instructions`: cut into parts, each made into rows by one task or actor.

A part is named by its place and the hash of what it is made from, so that a job that was killed goes on where it was.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from speechgpt.language.conversations import Conversation
    from speechgpt.language.instructions import Refusal, Row, RowBuilder
    from speechgpt.language.text_to_unit import TextToUnit
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

    Write = Callable[[Workspace, str, Iterator[Row | Refusal]], None]
    """Writes rows as the part of that name."""

_WRITTEN_BY_MODEL = 128
"""Dialogues in one part: minutes of a CPU's work where a model writes their units …"""
_READ_FROM_UNITS = 4096
"""… and seconds where voices have spoken them."""


@dataclass(frozen=True)
class QuestionPart:
    """Consecutive dialogues that become one part of the rows."""

    name: str
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


def plan(talks: "Sequence[Conversation]", recipe: "Recipe") -> list[QuestionPart]:
    size = _WRITTEN_BY_MODEL if _by_model(recipe) else _READ_FROM_UNITS
    parts = []
    for first in range(0, len(talks), size):
        chosen = talks[first : first + size]
        digest = hashlib.sha256(repr([(talk.id, talk.category, talk.turns) for talk in chosen]).encode()).hexdigest()
        parts.append(QuestionPart(f"questions-{first:010d}-{digest[:16]}.parquet", first, first + len(chosen)))
    return parts


def make(
    parts: Sequence[QuestionPart],
    talks: "Sequence[Conversation]",
    recipe: "Recipe",
    workspace: "Workspace",
    builder: "RowBuilder",
    write: "Write",
) -> "Iterator[int]":
    """Make the rows of parts on the cluster and write them; yields the dialogues in each as it is done."""
    import ray
    import ray.data

    # By reference: copied to each node once, and not to each task.
    shared = ray.put((builder, list(talks)))
    rows = [{"name": part.name, "first": part.first, "end": part.end} for part in parts]
    to_do = ray.data.from_items(rows, override_num_blocks=len(rows))
    if _by_model(recipe):
        pool = recipe.resources.text_to_unit
        done = to_do.map(
            cast("Any", Writer),
            fn_constructor_args=(workspace, recipe, shared, write),
            compute=ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
    else:
        done = to_do.map(partial(_collect, workspace=workspace, shared=shared, write=write))
    for row in done.iter_rows():
        yield row["end"] - row["first"]


def _collect(row: dict[str, Any], workspace: "Workspace", shared: Any, write: "Write") -> dict[str, Any]:
    """One task: rows that start from text; those that start from speech come with the clips of the voices."""
    import ray

    builder, talks = ray.get(shared)
    chosen = talks[row["first"] : row["end"]]
    write(workspace, row["name"], (item for talk in chosen for item in builder.of_conversation(talk)))
    return row


class Writer:
    """One actor: the model is loaded once, and writes the units of part after part."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe", shared: Any, write: "Write") -> None:
        import ray
        import torch

        from jobs.train_text_to_unit import MODEL
        from speechgpt.language.text_to_unit import TextToUnit

        self._workspace, self._recipe, self._write = workspace, recipe, write
        self._builder, self._talks = ray.get(shared)
        device = recipe.resources.text_to_unit.device
        if device == "cpu":
            torch.set_num_threads(1)
        with workspace.fetch(MODEL) as directory:
            self._model = TextToUnit.load(directory, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chosen = self._talks[row["first"] : row["end"]]
        self._write(self._workspace, row["name"], written(self._model, self._builder, chosen, self._recipe))
        return row


def written(
    model: "TextToUnit", builder: "RowBuilder", talks: "Sequence[Conversation]", recipe: "Recipe"
) -> "Iterator[Row | Refusal]":
    """Every row of dialogues whose speech the model writes."""
    section, settings = recipe.instructions, recipe.text_to_unit
    turns = [list(talk.asked(section.questions.history, section.max_answer_words)) for talk in talks]
    texts = sorted({text for asked in turns for turn in asked for text in (turn.question, turn.answer)})
    units = dict(zip(texts, model.write(texts, settings.beams, settings.max_units), strict=True))
    for talk, asked in zip(talks, turns, strict=True):
        yield from builder.of_conversation(talk, ("t2t",))
        for turn in asked:
            yield from builder.of_written_speech(turn, talk.category, units[turn.question], units[turn.answer])


def _by_model(recipe: "Recipe") -> bool:
    return recipe.instructions.questions.spoken_by == "text-to-unit"
