"""A reply read while it is generated: words and units as soon as nothing that follows can change them."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from speechgpt.language import answers
from speechgpt.language.answers import Answer
from speechgpt.language.prompts import Kind
from speechgpt.language.vocabulary import Vocabulary

Field = Literal["transcript", "text"]


class Words(NamedTuple):
    """More of the transcript or of the text. All of a field's, joined, are the field of the finished `Answer`."""

    field: Field
    text: str


class Units(NamedTuple):
    """More of the spoken answer."""

    units: list[int]


class Unfolding:
    """One reply of one kind, token by token."""

    def __init__(self, vocabulary: Vocabulary, kind: Kind) -> None:
        self._vocabulary, self._kind = vocabulary, kind
        self._ids: list[int] = []
        self._told: dict[Field, str] = {"transcript": "", "text": ""}
        self._speaking = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def push(self, tokens: Sequence[int]) -> list[Words | Units]:
        """Take the next tokens; give what they make certain. A word is certain once something follows it."""
        self._ids += tokens
        vocabulary = self._vocabulary
        words: list[Words] = []
        if not self._speaking:
            self._speaking = vocabulary.sosp in tokens
            words = list(self._words(whole=self._speaking))
        units = vocabulary.units(tokens)
        return [*words, *([Units(units)] if units else [])]

    def finish(self) -> tuple[list[Words], Answer]:
        """No token follows: the words that were held back, and the answer as `answers.parse` reads it."""
        return list(self._words(whole=True)), answers.parse(self._ids, self._vocabulary, self._kind)

    def _words(self, whole: bool) -> Iterable[Words]:
        read = answers.parse(self._ids, self._vocabulary, self._kind)
        fields: tuple[tuple[Field, str, bool], ...] = (
            ("transcript", read.transcript or "", whole or bool(read.text)),
            ("text", read.text or "", whole),
        )
        for field, text, closed in fields:
            certain = text if closed else _certain(text)
            told = self._told[field]
            if len(certain) > len(told) and certain.startswith(told):
                self._told[field] = certain
                yield Words(field, certain[len(told) :])


def _certain(text: str) -> str:
    """Without the last word, which may go on or turn out to be a tag, and without the semicolon that ends a field."""
    return text.rpartition(" ")[0].rstrip("; ")
