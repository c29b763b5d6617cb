"""Question sets inside the job `instructions`: cut into parts, each made into rows by one actor.

A part is named by its place and the hash of what it is made from, so that a job that was killed goes on where it was.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from speechgpt.language.conversations import Conversation
    from speechgpt.language.instructions import Refusal, Row, RowBuilder
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

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


def pool(recipe: "Recipe") -> dict[str, Any]:
    """How Ray Data runs `Maker`: in actors, since a model is loaded once."""
    import ray.data

    wanted = recipe.resources.text_to_unit if _by_model(recipe) else recipe.resources.tokenisation
    return {
        "compute": ray.data.ActorPoolStrategy(min_size=wanted.min_actors, max_size=wanted.max_actors),
        "num_cpus": wanted.cpus,
        "num_gpus": wanted.gpus if _by_model(recipe) else 0,
    }


class Maker:
    """One actor: makes the rows of a part and writes them."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe", builder: Any, write: "Callable[..., None]") -> None:
        import ray

        self._workspace, self._recipe, self._write = workspace, recipe, write
        self._builder: RowBuilder = ray.get(builder)
        self._model: Any = None
        if _by_model(recipe):
            import torch

            from jobs.train_text_to_unit import MODEL
            from speechgpt.language.text_to_unit import TextToUnit

            if not torch.cuda.is_available():
                torch.set_num_threads(1)
            with workspace.fetch(MODEL) as directory:
                self._model = TextToUnit.load(directory, "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        talks: Sequence[Conversation] = ray.get(row["talks"])
        made = self._written(talks) if self._model else self._heard(talks)
        self._write(self._workspace, row["name"], made)
        return {"talks": len(talks)}

    def _heard(self, talks: "Sequence[Conversation]") -> "Iterator[Row | Refusal]":
        """Rows that start from text; those that start from speech come with the clips of the voices."""
        for talk in talks:
            yield from self._builder.of_conversation(talk)

    def _written(self, talks: "Sequence[Conversation]") -> "Iterator[Row | Refusal]":
        section, settings = self._recipe.instructions, self._recipe.text_to_unit
        turns = [list(talk.asked(section.questions.history, section.max_answer_words)) for talk in talks]
        texts = sorted({text for asked in turns for turn in asked for text in (turn.question, turn.answer)})
        written = self._model.write(texts, settings.beams, settings.max_units)
        units = dict(zip(texts, written, strict=True))
        for talk, asked in zip(talks, turns, strict=True):
            yield from self._builder.of_conversation(talk, ("t2t",))
            for turn in asked:
                yield from self._builder.of_written_speech(
                    turn, talk.category, units[turn.question], units[turn.answer]
                )


def _by_model(recipe: "Recipe") -> bool:
    return recipe.instructions.questions.spoken_by == "text-to-unit"
