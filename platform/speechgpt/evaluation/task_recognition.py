"""Whether a model does what a prompt asks for when no grammar makes it (SPEC 7.1): the shape of what it writes."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from speechgpt.evaluation.metrics import Bootstrap, share
from speechgpt.language import answers
from speechgpt.language.config import Dialect
from speechgpt.language.prompts import Exchange, Kind, descriptions, question_template
from speechgpt.language.vocabulary import Vocabulary

Shape = Literal["text", "speech", "t2t", "t2s", "s2t", "s2s", "mixed", "nothing"]
"""text: words without a tag; speech: units alone; a form's name: its tags and what belongs to them; mixed: anything
else."""


class Task(NamedTuple):
    """What is asked for. wording: of `transcribe` and `speak`, the first description, or one that the seed draws."""

    name: str
    kind: Kind
    wording: Literal["fixed", "drawn", ""] = ""


TASKS = (
    Task("transcribe", "transcribe", "fixed"),
    Task("transcribe, other wordings", "transcribe", "drawn"),
    Task("speak", "speak", "fixed"),
    Task("speak, other wordings", "speak", "drawn"),
    Task("text", "text"),
    Task("s2s", "s2s"),
    Task("s2t", "s2t"),
    Task("t2s", "t2s"),
    Task("t2t", "t2t"),
)
_SHAPES: Mapping[Kind, Shape] = {
    "transcribe": "text",
    "text": "text",
    "speak": "speech",
    "s2s": "s2s",
    "s2t": "s2t",
    "t2s": "t2s",
    "t2t": "t2t",
}
_PARTS: Mapping[frozenset[str], Shape] = {
    frozenset(): "nothing",
    # Read as s2t, words before any tag are the transcript: there they are told from those after [ta].
    frozenset({"transcript"}): "text",
    frozenset({"units"}): "speech",
    frozenset({"text"}): "t2t",
    frozenset({"text", "units"}): "t2s",
    frozenset({"transcript", "text"}): "s2t",
    frozenset({"transcript", "text", "units"}): "s2s",
}


class Done(NamedTuple):
    """What one reply turned out to be. well_formed: and it is so to the letter, with its end (see `Answer`)."""

    shape: Shape
    well_formed: bool


def asked(task: Task, name: str, text: str, units: Sequence[int], seed: int) -> Exchange:
    """The task for one clip. name: its id, which the wording is drawn by."""
    wording = ""
    if task.kind in ("transcribe", "speak"):
        known = descriptions("transcribe" if task.kind == "transcribe" else "speak")
        wording = random.Random(f"{seed}:{name}").choice(known[1:]) if task.wording == "drawn" else known[0]
    return Exchange(task.kind, question=text, question_units=tuple(units), description=wording)


def done(generated: Sequence[int], vocabulary: Vocabulary, kind: Kind) -> Done:
    """What generated tokens are, whatever was asked for; and whether they are well-formed for `kind`."""
    loose = answers.parse(generated, vocabulary, "s2t")
    there = {"transcript": loose.transcript, "text": loose.text, "units": loose.units}
    shape = _PARTS.get(frozenset(name for name, part in there.items() if part), "mixed")
    return Done(shape, answers.parse(generated, vocabulary, kind).well_formed)


def right_shapes(dialect: Dialect, kind: Kind) -> frozenset[Shape]:
    """Shapes that answer a prompt of this kind: those of all forms that this dialect asks for in the same words."""
    alike = [other for other in _SHAPES if question_template(dialect, other) == question_template(dialect, kind)]
    return frozenset(_SHAPES[other] for other in alike)


def figures(dialect: Dialect, found: Mapping[str, Sequence[Done]], bootstrap: Bootstrap) -> dict[str, Any]:
    """{task's name: how often it was done}, and `all` tasks together. found: by the task's name; unasked ones lack."""
    table: dict[str, Any] = {}
    recognised: list[bool] = []
    for task in TASKS:
        if not (replies := found.get(task.name)):
            continue
        right = right_shapes(dialect, task.kind)
        outcomes = [reply.shape in right for reply in replies]
        recognised += outcomes
        formed = share([reply.well_formed for reply in replies], bootstrap)
        recognition = share(outcomes, bootstrap)
        table[task.name] = {
            "asked": len(replies),
            "right_shapes": sorted(right),
            "recognised": recognition and recognition.figures(),
            "well_formed": formed and formed.figures(),
            "shapes": dict(sorted(Counter(reply.shape for reply in replies).items())),
        }
    overall = share(recognised, bootstrap)
    return {"tasks": table, "all": overall and overall.figures()}
