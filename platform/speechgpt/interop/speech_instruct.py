"""SpeechInstruct files as published, and stage-1 text files: one line becomes what it teaches (SPEC 1.2 to 1.4, 2.4).

The files hold more forms than their README shows: answers over several lines, chains with and without `[tq]`, text
chats, `<eoh>` with and without the dot, both end markers. A row is therefore read by its markers, from left to right,
and not by one pattern a form: no row can make the reader slow.

Errors never quote a row: published rows hold what should not be shown (SPEC 1.2).
"""

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from speechgpt.language.prompts import Exchange, Kind, descriptions, row_text
from speechgpt.language.segments import (
    END_OF_ANSWER,
    END_OF_HUMAN,
    END_OF_SEQUENCE,
    HUMAN,
    SPEECH_START,
    SPEECHGPT,
    TEXT_ANSWER,
    TEXT_QUESTION,
    UNIT_ANSWER,
    Speech,
    find_marker,
    write,
)

Form = Literal["json", "text"]
"""What a line of a file is: a JSON object with `prefix` and `plain_text`, or bare units."""


class PublishedRowError(ValueError):
    """A line that is no row. reason: `unreadable` (no JSON object of the two texts) or `broken_markers`."""

    def __init__(self, reason: Literal["unreadable", "broken_markers"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.detail)

    def at(self, file: str, line: int) -> str:
        """The message for people, naming file and line (from 1)."""
        return f"{file}, line {line}: {self.detail}"


class PublishedText(NamedTuple):
    """The two strings of a line, byte for byte; a model is trained on `prefix + plain_text`."""

    prefix: str
    plain_text: str


@dataclass(frozen=True)
class PublishedRow:
    """What a row says. kind: that of its last exchange, or `units` for a row of bare units."""

    kind: Kind | Literal["units"]
    exchanges: tuple[Exchange, ...] = ()
    units: tuple[int, ...] = ()
    """Of a row of bare units."""


def form_of(file: str) -> Form:
    """By the file's name: `.txt` holds bare units, `.jsonl` and `.json` hold objects; `.gz` may follow."""
    return "text" if file.removesuffix(".gz").endswith(".txt") else "json"


def read_line(line: bytes, form: Form) -> PublishedText:
    """The strings of one line, without its line end.

    Keys other than `prefix` and `plain_text` are ignored. Raises PublishedRowError (`unreadable`).
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PublishedRowError("unreadable", f"byte {error.start + 1} is not UTF-8") from None
    return PublishedText("", text) if form == "text" else _object(text)


def read(text: PublishedText) -> PublishedRow:
    """What a row says. Raises PublishedRowError (`broken_markers`) saying which marker is missing or misplaced."""
    if marker := _marker(text.prefix):
        raise _broken(f"the prefix holds the control marker {marker}")
    before, *turns = text.plain_text.split(f"{HUMAN}:")
    if not turns:
        if (units := _speech(before)) is None:
            raise _broken(f"neither a row that begins with {HUMAN}: nor one line of units")
        return PublishedRow("units", (), units)
    if before.strip():
        raise _broken(f"text before the first {HUMAN}:")
    exchanges = tuple(_exchange(turn, number) for number, turn in enumerate(turns, 1))
    return PublishedRow(exchanges[-1].kind, exchanges)


def rewrite(row: PublishedRow, dialect: Literal["released", "paper"], prefix: str) -> PublishedText:
    """The row in another dialect and under another prefix, as a row of our own is written.

    A cross-modal row without a task description gets the first one of our list.
    """
    if row.kind == "units":
        return PublishedText("", write([Speech(row.units)]))
    return PublishedText(prefix, row_text(dialect, [_described(exchange) for exchange in row.exchanges]))


_END = re.compile(rf"(?:{re.escape(END_OF_ANSWER)}|{re.escape(END_OF_SEQUENCE)})\.?\s*\Z")
_UNIT = "<(?:0|[1-9][0-9]{0,5})>"
"""As the vocabulary spells it; other spellings are no unit tokens."""
_SPEECH = re.compile(rf"<sosp>\s*((?:{_UNIT}\s*)+)<eosp>")
_NUMBER = re.compile("[0-9]+")
_INPUT = re.compile("This is (?:the )?input:")
_SPOKEN_TASK = re.compile("This is (?:a|the) speech instruction:")
_WRITTEN_TASK = "This is a text instruction:"
_TASK = ". And your response should be "
"""What follows the question in the paper's chains."""


class _Asked(NamedTuple):
    """The user's half of a turn; description is None where it names no input."""

    text: str = ""
    units: tuple[int, ...] = ()
    description: str | None = None
    input: str = ""


class _Answered(NamedTuple):
    """The assistant's half; None where its tag is missing."""

    plain: str
    answer: str | None
    speech: str | None


def _object(text: str) -> PublishedText:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        hint = "; a JSON array must become one object a line (jq -c '.[]')" if text.lstrip().startswith("[") else ""
        raise PublishedRowError("unreadable", f"not a JSON object ({what}){hint}") from None
    if not isinstance(row, dict):
        hint = "; a JSON array must become one object a line (jq -c '.[]')" if isinstance(row, list) else ""
        raise PublishedRowError("unreadable", f"a JSON object is expected, not {type(row).__name__}{hint}")
    for key in ("prefix", "plain_text"):
        if not isinstance(value := row.get(key), str):
            found = "missing" if key not in row else type(value).__name__
            raise PublishedRowError("unreadable", f"the text {key!r} is expected; it is {found}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise PublishedRowError("unreadable", f"{key!r} holds half of a surrogate pair, which is no text") from None
    return PublishedText(row["prefix"], row["plain_text"])


def _exchange(turn: str, number: int) -> Exchange:
    asked, mark, answered = turn.partition(f"{SPEECHGPT}:")
    if not mark:
        raise _broken(f"turn {number} has no {SPEECHGPT}:")
    if not (end := _END.search(answered)):
        raise _broken(f"turn {number} does not end with {END_OF_ANSWER} or {END_OF_SEQUENCE}")
    question = _asked(asked.strip(), number)
    reply = _answered(answered[: end.start()].strip(), number)
    exchange = _combined(question, reply)
    if exchange is None:
        raise _broken(f"turn {number} has a form that is none of SpeechGPT's tasks")
    for name in ("description", "question", "answer"):
        if marker := find_marker(getattr(exchange, name)):
            raise _broken(f"the {name} of turn {number} holds the control marker {marker[:20]}")
    return exchange


def _asked(text: str, number: int) -> _Asked:
    said, end, after = text.rpartition(END_OF_HUMAN)
    if not end or not said or after not in ("", "."):
        # The paper's text-to-text form, as it is remembered, has no <eoh> (SPEC 1.3).
        if not (text.startswith(_WRITTEN_TASK) and _TASK in text):
            raise _broken(f"turn {number} has no {END_OF_HUMAN}, or nothing before it")
        said = text
    said = said.strip()
    if said.startswith(SPEECH_START) and (units := _speech(said)):
        return _Asked(units=units)
    if task := _SPOKEN_TASK.match(said):
        speech = _SPEECH.match(said[task.end() :].lstrip())
        if speech and not find_marker(speech.string[speech.end() :]):
            return _Asked(units=_units(speech))
    if said.startswith(_WRITTEN_TASK) and _TASK in said:
        question, _, task_sentence = said.removeprefix(_WRITTEN_TASK).rpartition(_TASK)
        if not find_marker(task_sentence):
            return _Asked(text=question.strip())
    if found := _INPUT.search(said):
        return _Asked(said, description=said[: found.start()].strip(), input=said[found.end() :].strip())
    return _Asked(said)


def _answered(text: str, number: int) -> _Answered:
    for tag in (TEXT_QUESTION, TEXT_ANSWER, UNIT_ANSWER):
        if text.count(tag) > 1:
            raise _broken(f"turn {number} has {tag} more than once")
    plain, _, rest = text.partition(TEXT_ANSWER)
    chain = TEXT_ANSWER in text
    if not chain:
        return _Answered(text, None, None)
    answer, _, speech = rest.partition(UNIT_ANSWER)
    if UNIT_ANSWER not in rest:
        return _Answered(_before_tag(plain), answer.strip(), None)
    return _Answered(_before_tag(plain), _before_tag(answer), speech.strip())


def _before_tag(text: str) -> str:
    """Text that a tag follows: the semicolon between them, and `[tq]` before it, are the template's."""
    return text.strip().removesuffix(";").removeprefix(TEXT_QUESTION).strip()


def _combined(asked: _Asked, reply: _Answered) -> Exchange | None:
    """The task that the two halves make; None if they make none."""
    if reply.answer is None:
        return _one_step(asked, reply.plain)
    if not reply.answer:
        return None
    answer_units = () if reply.speech is None else _speech(reply.speech)
    if answer_units is None:
        return None
    if asked.units:
        kind: Kind = ("s2s" if answer_units else "s2t") if reply.plain else "direct"
        if kind == "direct" and not answer_units:
            return None
        return Exchange(kind, reply.plain, reply.answer, asked.units, answer_units)
    if reply.plain or not asked.text:
        return None
    return Exchange("t2s" if answer_units else "t2t", asked.text, reply.answer, (), answer_units)


def _one_step(asked: _Asked, reply: str) -> Exchange | None:
    """Recognition, speaking, a text chat, or speech for speech: an answer without tags."""
    spoken = _speech(reply)
    if asked.units:
        return Exchange("standard", question_units=asked.units, answer_units=spoken) if spoken else None
    if asked.description is not None and asked.input:
        heard = _speech(asked.input)
        if heard and reply and not spoken:
            return Exchange("transcribe", answer=reply, question_units=heard, description=asked.description)
        if spoken and not heard:
            return Exchange("speak", question=asked.input, answer_units=spoken, description=asked.description)
    if asked.text and reply and not spoken:
        return Exchange("text", asked.text, reply)
    return None


def _described(exchange: Exchange) -> Exchange:
    if exchange.kind not in ("transcribe", "speak") or exchange.description:
        return exchange
    return replace(exchange, description=descriptions("transcribe" if exchange.kind == "transcribe" else "speak")[0])


def _speech(text: str) -> tuple[int, ...] | None:
    """The units of a text that is speech and nothing else."""
    found = _SPEECH.fullmatch(text.strip())
    return _units(found) if found else None


def _units(speech: re.Match[str]) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(speech[1])))


@lru_cache(maxsize=64)
def _marker(prefix: str) -> str | None:
    return find_marker(prefix)


def _broken(detail: str) -> PublishedRowError:
    return PublishedRowError("broken_markers", detail)
