"""Rows of question sets in text, whatever their maker called things, as dialogues of questions and answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from speechgpt.language.config import QuestionsSection

Pair = tuple[str, str]
"""A question and its answer."""

_ASKS = {"user", "human"}
_ANSWERS = {"assistant", "gpt"}


class ConversationError(ValueError):
    """A row that holds no dialogue; the message says what is wrong and never what the row says."""


class AskedTurn(NamedTuple):
    """One turn of a dialogue, to be spoken. earlier: what was said before it, as far as it is remembered."""

    id: str
    question: str
    answer: str
    earlier: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A dialogue of one or more questions with their answers. language: as its row says; empty if it does not."""

    id: str
    category: str
    turns: tuple[Pair, ...]
    language: str = ""

    def asked(self, history: int, max_answer_words: int) -> Iterator[AskedTurn]:
        """The turns whose answers are short enough to be spoken, each with at most `history` turns before it.

        A long answer is not remembered either, nor what was said before it: a row is to fit into a block.
        """
        earlier: list[Pair] = []
        for number, (question, answer) in enumerate(self.turns, 1):
            if len(answer.split()) >= max_answer_words:
                earlier.clear()
                continue
            name = f"{self.id}.{number}" if len(self.turns) > 1 else self.id
            yield AskedTurn(name, question, answer, tuple(earlier[max(0, len(earlier) - history) :]))
            earlier.append((question, answer))


def read(row: Any, section: QuestionsSection, name: str, category: str) -> Conversation:
    """The dialogue of one row. name: its id; category: where the row names none. Raises ConversationError."""
    if not isinstance(row, Mapping):
        raise ConversationError(f"an object is expected, not a {type(row).__name__}")
    turns = row.get(section.turns)
    if turns is not None:
        pairs = _pairs(turns, section)
    elif section.question in row and section.answer in row:
        pairs = [(_text(row, section.question), _text(row, section.answer))]
    else:
        raise ConversationError(
            f"neither the texts {section.question!r} and {section.answer!r} nor a list {section.turns!r}: name the "
            "row's keys in instructions.questions.question, .answer and .turns"
        )
    return Conversation(
        name, _word(row, "category") or category, tuple(pairs), _word(row, "language").replace("_", "-").lower()
    )


def _pairs(turns: Any, section: QuestionsSection) -> list[Pair]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ConversationError(f"{section.turns!r} is not a list of turns")
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise ConversationError(f"{section.turns!r} holds something else than objects")
    if section.question in turns[0]:
        return [(_text(turn, section.question), _text(turn, section.answer)) for turn in turns]
    said = [_message(turn, section.turns) for turn in turns]
    roles = [role for role, _ in said]
    if len(said) % 2 or roles != ["user", "assistant"] * (len(said) // 2):
        raise ConversationError(f"{section.turns!r} does not go from user to assistant, in turns, to its end")
    return [(said[place][1], said[place + 1][1]) for place in range(0, len(said), 2)]


def _message(turn: Mapping[str, Any], key: str) -> tuple[str, str]:
    role = str(turn.get("role", turn.get("from", ""))).lower()
    if role not in _ASKS | _ANSWERS:
        raise ConversationError(
            f"{key!r} has a turn of the role {role!r:.20}, which a spoken dialogue has no place for"
        )
    return "user" if role in _ASKS else "assistant", _text(turn, "content" if "content" in turn else "value")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ConversationError(f"{key!r} is empty or no text")
    return value.strip()


def _word(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value.strip() if isinstance(value, str) else ""
