"""Which rows of a corpus made by others are refused, and why.

That is what nobody should be taught (harmful and personal content, which the published chain file begins with), what
units cannot carry (styles of speaking: to train on them teaches the model to ignore what it is told), and what does not
fit this run (lengths, codebook).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from operator import eq
from typing import Literal

import yaml

from speechgpt.language.config import FiltersSection
from speechgpt.language.prompts import Exchange

Reason = Literal["harmful", "personal", "style", "long_answer", "over_block", "unit_range", "repeated_units"]
List = Literal["harmful", "personal", "style_of_a_task", "style_of_a_question"]
"""The lists of `row_filter.yaml`."""

_CHAINS = ("s2s", "s2t", "t2s", "t2t", "direct", "standard")
_SPOKEN_CHAINS = ("s2s", "t2s", "direct", "standard")
_MARKERS_OF_A_TURN = 3
"""`[Human]`, `<eoh>` and `[SpeechGPT]` are one token each in every vocabulary."""
_MARKERS_OF_SPEECH = 2


@dataclass(frozen=True)
class RowFilter:
    """The recipe's filters, with what they measure against.

    units: size of the codebook. blocks: tokens of the longest block that draws a kind; a kind without one has no limit.
    """

    section: FiltersSection
    max_answer_words: int
    units: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    def reasons(
        self, kind: str, prefix: str, exchanges: Sequence[Exchange], bare_units: Sequence[int] = ()
    ) -> list[Reason]:
        """Every reason against a row; none if it stays. bare_units: of a row of kind `units`, without exchanges."""
        on = self.section
        speech: list[Sequence[int]] = [
            units for e in exchanges for units in (e.question_units, e.answer_units) if units
        ]
        speech += [bare_units] if bare_units else []
        found: list[Reason] = []
        if on.harmful and any(matches("harmful", text) for text in _texts(exchanges)):
            found.append("harmful")
        if on.personal and any(is_personal(text) for text in _texts(exchanges)):
            found.append("personal")
        if on.style and any(map(asks_for_style, exchanges)):
            found.append("style")
        if on.long_answers and any(
            e.kind in _CHAINS and len(e.answer.split()) >= self.max_answer_words for e in exchanges
        ):
            found.append("long_answer")
        if on.over_block and kind in self.blocks and tokens_at_least(prefix, exchanges, speech) > self.blocks[kind]:
            found.append("over_block")
        if on.unit_range and any(max(units) >= self.units for units in speech):
            found.append("unit_range")
        if on.repeated_units and any(any(map(eq, units, units[1:])) for units in speech):
            found.append("repeated_units")
        return found


def asks_for_style(exchange: Exchange) -> bool:
    """Whether speech is asked for in a manner that units do not have."""
    if exchange.kind == "speak":
        return matches("style_of_a_task", exchange.description)
    return exchange.kind in _SPOKEN_CHAINS and matches("style_of_a_question", exchange.question)


def is_personal(text: str) -> bool:
    return matches("personal", text) or any(is_card(found) for found in _CARD_LIKE.findall(text))


def is_card(digits: str) -> bool:
    """Whether 13 to 19 digits, perhaps in groups, carry the check digit of a payment card (Luhn)."""
    numbers = [int(digit) for digit in digits if digit.isdecimal()]
    if not 13 <= len(numbers) <= 19:
        return False
    doubled = [sum(divmod(2 * n, 10)) if place % 2 else n for place, n in enumerate(reversed(numbers))]
    return sum(doubled) % 10 == 0


def matches(name: List, text: str) -> bool:
    """Whether an entry of a list is found in a text."""
    return bool(text) and _pattern(name).search(text) is not None


def tokens_at_least(prefix: str, exchanges: Sequence[Exchange], speech: Sequence[Sequence[int]]) -> int:
    """Tokens that a row has in any vocabulary: its units, markers, and one for each word. The real count is higher."""
    units = sum(len(each) + _MARKERS_OF_SPEECH for each in speech)
    words = sum(len(text.split()) for text in (prefix, *_texts(exchanges)))
    return units + words + _MARKERS_OF_A_TURN * len(exchanges)


_CARD_LIKE = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])")


def _texts(exchanges: Sequence[Exchange]) -> list[str]:
    return [text for e in exchanges for text in (e.description, e.question, e.answer) if text]


@cache
def _pattern(name: List) -> re.Pattern[str]:
    listed = yaml.safe_load(resources.files("speechgpt.language").joinpath("row_filter.yaml").read_text("utf-8"))
    return re.compile(r"(?<!\w)(?:" + "|".join(listed[name]) + r")(?!\w)", re.IGNORECASE)
