"""Reading what a model has generated. The prompt never comes in here: nothing a user wrote can pass for an answer."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from speechgpt.language.prompts import Kind
from speechgpt.language.segments import (
    END_OF_ANSWER,
    END_OF_HUMAN,
    END_OF_SEQUENCE,
    SPEECH_END,
    SPEECH_START,
    TAG_MARKERS,
    TEXT_ANSWER,
    TEXT_QUESTION,
    UNIT_ANSWER,
)
from speechgpt.language.vocabulary import Piece, Vocabulary

_TAG = re.compile("(" + "|".join(map(re.escape, TAG_MARKERS)) + ")")
_ENDS = frozenset({END_OF_ANSWER, END_OF_SEQUENCE})
_FIELDS = {TEXT_QUESTION: "transcript", TEXT_ANSWER: "text", UNIT_ANSWER: "before speech"}

PARTS: dict[Kind, frozenset[str]] = {
    "transcribe": frozenset({"text"}),
    "speak": frozenset({"units"}),
    "text": frozenset({"text"}),
    "s2s": frozenset({"transcript", "text", "units"}),
    "s2t": frozenset({"transcript", "text"}),
    "t2s": frozenset({"text", "units"}),
    "t2t": frozenset({"text"}),
    "direct": frozenset({"text", "units"}),
    "standard": frozenset({"units"}),
}
"""What an answer of each kind holds: all of these and nothing else."""


class Answer(NamedTuple):
    """One reply.

    transcript: the question as the model heard it; text: its answer (or, for `transcribe`, the transcription);
    units: its answer as speech. well_formed: exactly the parts that were asked for, closed, in the codebook, without
    adjacent duplicates of merged units, and ended. finish: whether it ended by itself or was cut.
    """

    transcript: str | None
    text: str | None
    units: list[int] | None
    well_formed: bool
    finish: Literal["stop", "length"]


def parse(generated: Sequence[int] | str, vocabulary: Vocabulary, kind: Kind) -> Answer:
    """Read generated tokens, or the same as text, of a reply of this kind; partial replies give what is there.

    Raises ValueError for text with a unit outside the codebook (tokens cannot hold one).
    """
    if isinstance(generated, str):
        pieces, ended = vocabulary.split(generated), False
    else:
        ended = vocabulary.eos in generated
        generated = generated[: list(generated).index(vocabulary.eos)] if ended else generated
        pieces = vocabulary.pieces(generated)
    if vocabulary.markers == "released":
        pieces = list(_find_tags(pieces))
    return _read(pieces, ended, vocabulary.merged, kind)


def _find_tags(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Tags are ordinary text in the published vocabulary; here they become markers."""
    for piece in pieces:
        if piece.kind != "text":
            yield piece
            continue
        for stretch in _TAG.split(piece.text):
            if stretch in TAG_MARKERS:
                yield Piece("marker", stretch)
            elif stretch.strip():
                yield Piece("text", stretch.strip())


def _read(pieces: Iterable[Piece], ended: bool, merged: bool, kind: Kind) -> Answer:
    fields: dict[str, str] = {}
    units: list[int] | None = None
    field = "lead"
    orderly, open_speech = True, False
    for piece in pieces:
        match piece.kind, piece.text:
            case "marker", str(end) if end in _ENDS:
                ended = True
                break
            case "marker", str(cut) if cut == END_OF_HUMAN:
                # Generation says with it that the reply used up its budget.
                ended = False
                break
            case "text", text:
                # After the speech only the full stop of the template may come.
                orderly &= field != "speech" and field not in fields and not open_speech
                fields.setdefault(field, text)
            case "units", _:
                orderly &= open_speech
                units = [*(units or []), *piece.units]
            case "marker", str(start) if start == SPEECH_START:
                orderly &= units is None and not open_speech
                open_speech = True
                units = units or []
            case "marker", str(end) if end == SPEECH_END:
                orderly &= open_speech
                open_speech, field = False, "speech"
            case "marker", str(tag) if tag in _FIELDS:
                orderly &= not open_speech
                field = _FIELDS[tag]
            case _:
                orderly = False
    if kind in ("s2t", "t2t") and field == _FIELDS[UNIT_ANSWER] and units is None:
        # Where nobody asked to hear it, an answer ends before it is spoken (`generation.ending`).
        ended = True
    answer = {name: _close(text) for name, text in fields.items()}
    if lead := answer.pop("lead", None):
        # The published chain has no [tq]: what comes before [ta] is the transcript.
        answer.setdefault("transcript" if "text" in answer or kind in ("s2s", "s2t") else "text", lead)
    present = {name for name in ("transcript", "text") if answer.get(name)} | ({"units"} if units else set())
    repeated = merged and units is not None and any(a == b for a, b in pairwise(units))
    return Answer(
        answer.get("transcript"),
        answer.get("text"),
        units,
        ended and orderly and not open_speech and not repeated and present == PARTS[kind],
        "stop" if ended else "length",
    )


def _close(text: str) -> str:
    """Text without the semicolon that the templates put before the next tag."""
    return text.removesuffix(";").rstrip()
