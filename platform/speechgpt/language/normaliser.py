"""Text as it is spoken: the form in which every word error rate of this project is counted, and some models read.

Both sides of a comparison go through `words`. In order: Unicode compatibility form, lower case; `&` and arithmetic
signs between digits become the words that are spoken for them; cardinals below 1000 and ordinals below 100 are
spelled out; hyphens part words; apostrophes go without a trace ("what's" is "whats"); every other sign goes;
a few British spellings become American. Sound-alikes that are different words ("three", "free") stay different.
"""

import re
import unicodedata

from speechgpt.language.numbers import in_words

_ORDINAL_OF = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_SPELLINGS = {"grey": "gray", "colour": "color", "colours": "colors", "favourite": "favorite", "centre": "center"}
_SIGNS = (
    (re.compile(r"(?<=\d)\s*\+\s*(?=\d)"), " plus "),
    (re.compile(r"(?<=\d)\s+[-\u2212\u2013]\s+(?=\d)|(?<=\d)\u2212(?=\d)"), " minus "),
    (re.compile(r"(?<=\d)\s*[x*\u00d7]\s*(?=\d)"), " times "),
    (re.compile(r"(?<=\d)\s*[/\u00f7]\s*(?=\d)"), " divided by "),
    (re.compile(r"\s*=\s*"), " equals "),
    (re.compile(r"&"), " and "),
    (re.compile(r"(?<=\d)\s*%"), " percent"),
)
_ORDINAL = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)\b")
_CARDINAL = re.compile(r"(?<![\d.])\d{1,3}(?![\d.]*\d)")


def ordinal(number: int) -> str:
    """`number` as an ordinal in words, 0 to 99: 21 is "twenty first"."""
    *front, last = in_words(number).split()
    return " ".join([*front, _ORDINAL_OF.get(last, re.sub("y$", "ie", last) + "th")])


def spoken(text: str) -> str:
    """`text` in normal form, as one string; what has no words stays as it is."""
    return " ".join(words(text)) or text


def words(text: str) -> list[str]:
    """`text` in normal form, as the list of its words."""
    text = unicodedata.normalize("NFKC", text).lower()
    for sign, spoken in _SIGNS:
        text = sign.sub(spoken, text)
    text = _ORDINAL.sub(lambda m: ordinal(int(m[1])), text)
    text = _CARDINAL.sub(lambda m: in_words(int(m[0])), text)
    text = re.sub(r"['\u2019`]", "", text)
    text = re.sub(r"[^\w\s]|_", " ", text)
    return [_SPELLINGS.get(word, word) for word in text.split()]
