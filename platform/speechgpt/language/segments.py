"""What a prompt or row is put together from: trusted template, untrusted text, and units.

Only a template can hold control tokens. Text from users and data is `Plain` until the very last, so that a marker typed
by a user is never more than a few letters.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from speechgpt.speech.units import format_units

SPEECH_START, SPEECH_END = "<sosp>", "<eosp>"
HUMAN, SPEECHGPT, END_OF_HUMAN, END_OF_SEQUENCE = "[Human]", "[SpeechGPT]", "<eoh>", "<eos>"
END_OF_ANSWER, TEXT_QUESTION, TEXT_ANSWER, UNIT_ANSWER = "<eoa>", "[tq]", "[ta]", "[ua]"

RELEASED_MARKERS = (SPEECH_START, SPEECH_END, HUMAN, SPEECHGPT, END_OF_HUMAN, END_OF_SEQUENCE)
"""What the published scripts add after the units, in their order (SPEC 2.3)."""
TAG_MARKERS = (END_OF_ANSWER, TEXT_QUESTION, TEXT_ANSWER, UNIT_ANSWER)
"""Ordinary text in the published vocabulary; one token each in ours."""

MARKER = re.compile("|".join(map(re.escape, RELEASED_MARKERS + TAG_MARKERS)) + r"|<\d+>")
"""Any control marker of either vocabulary, as it stands in a row's string."""


class MarkerError(ValueError):
    """Text that holds a control marker, and so cannot be written into a row."""


@dataclass(frozen=True)
class Template:
    """Our own words; markers and `<n>` in them are control tokens."""

    text: str


@dataclass(frozen=True)
class Plain:
    """A user's or a data set's words; nothing in them is a control token."""

    text: str


@dataclass(frozen=True)
class Speech:
    """Merged units of one stretch of speech."""

    units: tuple[int, ...]


Segment = Template | Plain | Speech


def find_marker(text: str) -> str | None:
    """The first control marker spelt out in `text`, in whichever vocabulary it would be one."""
    match = MARKER.search(text)
    return match.group() if match else None


def write(segments: Iterable[Segment]) -> str:
    """The segments as one string of a SpeechInstruct row.

    Raises MarkerError when plain text holds a marker: a string cannot tell it from the real one.
    """
    parts = []
    for segment in segments:
        match segment:
            case Speech(units):
                parts.append(format_units(units))
            case Plain(text):
                if marker := find_marker(text):
                    raise MarkerError(f"text holds the control marker {marker!r}: {text[:80]!r}")
                parts.append(text)
            case Template(text):
                parts.append(text)
    return "".join(parts)
