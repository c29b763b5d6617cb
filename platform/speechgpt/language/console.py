"""The published console as data: how a typed line becomes a prompt, and what is recorded of the reply (SPEC 2.5).

A line is cut at `is input:`; the parts that name sound files become units and the rest stays text. The published
weights are asked with their console's own prompt, the user's wording in it; a model of ours is asked for the same task
as it was taught.
"""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from speechgpt.language.answers import Answer
from speechgpt.language.prompts import Kind, PromptFormat, Turn
from speechgpt.language.segments import (
    SPEECH_END,
    SPEECH_START,
    TEXT_ANSWER,
    UNIT_ANSWER,
    Plain,
    Segment,
    Speech,
    Template,
)

INPUT_MARK = "is input:"

Part = str | tuple[int, ...]
"""A stretch of a line between two marks: text as it was typed, or the units of the sound file that it named."""


class Record(TypedDict):
    """A line of `responses.json`, with the published names. Units are written as the published decoder writes them,
    `<sosp> <1> <2> <eosp>`; fields that a reply does not have are empty."""

    question: str
    answer: str
    textQuestion: str
    textAnswer: str
    unitAnswer: str


def task(parts: Sequence[Part]) -> Kind:
    """What a line asks for: after the mark, speech is to be written down and text to be read aloud; without it, speech
    is a spoken question and text a written one."""
    spoken = isinstance(parts[-1], tuple)
    if len(parts) > 1:
        return "transcribe" if spoken else "speak"
    return "s2s" if spoken else "text"


def published_prompt(prefix: str, parts: Sequence[Part]) -> list[Segment]:
    """`{prefix}[Human]: {line} <eoh>. [SpeechGPT]: `; nothing that is typed becomes a control token."""
    segments: list[Segment] = [Template(prefix + "[Human]: ")]
    for place, part in enumerate(parts):
        if place:
            segments.append(Plain(INPUT_MARK))
        segments.append(Speech(part) if isinstance(part, tuple) else Plain(part))
    return [*segments, Template(" <eoh>. [SpeechGPT]: ")]


def taught_prompt(prompts: PromptFormat, parts: Sequence[Part]) -> tuple[list[Segment], Kind]:
    """The same task in the words that a model of ours was taught, and the kind of reply to it.

    Raises ValueError for lines of more than one recording or text, which it was not taught.
    """
    kind, *before, last = task(parts), *parts
    if len(before) > 1 or any(isinstance(part, tuple) for part in before):
        raise ValueError(f"this model takes one recording or one text after {INPUT_MARK!r}, and words before it")
    if isinstance(last, tuple):
        if kind == "transcribe":
            return prompts.transcription(last), kind
        return prompts.dialogue([Turn("user", units=last)], "chain"), kind
    if kind == "speak":
        return prompts.speaking(last.strip()), kind
    return prompts.dialogue([Turn("user", text=last.strip())], "text"), "t2t"


def record(parts: Sequence[Part], answer: Answer) -> Record:
    """What `responses.json` says of one reply.

    Only the reply is read, never the prompt, so that no tag in a question passes for one of the answer; and the
    punctuation that the published parser leaves at the fields' ends is not there.
    """
    question = INPUT_MARK.join(f" {_units(part)}" if isinstance(part, tuple) else part for part in parts)
    units = _units(answer.units) if answer.units else ""
    text = answer.text or ""
    if task(parts) != "s2s":
        return _record(question, "; ".join(filter(None, (text, units))), "", "", "")
    heard = answer.transcript or ""
    tagged = (heard, f"{TEXT_ANSWER} {text}" if text else "", f"{UNIT_ANSWER} {units}" if units else "")
    return _record(question, "; ".join(filter(None, tagged)), heard, text, units)


def _record(question: str, answer: str, heard: str, text: str, units: str) -> Record:
    return Record(question=question.strip(), answer=answer, textQuestion=heard, textAnswer=text, unitAnswer=units)


def _units(units: Iterable[int]) -> str:
    return " ".join([SPEECH_START, *(f"<{unit}>" for unit in units), SPEECH_END])
