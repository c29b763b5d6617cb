"""Whether a text is in a language, as far as its script and most frequent words tell.

A filter against sets that mix languages (MOSS's are English and Chinese), not a judge: a text that has too little to
go by is taken at its word.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib import resources
from unicodedata import name

import yaml

from speechgpt.language.config import SpokenLanguage

_OTHER_SCRIPT = 0.3
"""Share of a text's letters that may be of another script: names and formulas."""
_TELLING = 2
"""Words of another language that it takes, and that must be twice as many as those of the right one."""
_WORDS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def is_in(text: str, language: SpokenLanguage) -> bool:
    """False if the text is certainly in another language."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    strange = sum(count for script, count in scripts.items() if script not in _facts(language)["scripts"])
    if strange > _OTHER_SCRIPT * scripts.total():
        return False
    words = [word.lower().replace("’", "'") for word in _WORDS.findall(text)]
    found = {each: sum(word in _facts(each)["words"] for word in words) for each in _languages()}
    most = max((count for each, count in found.items() if each != language), default=0)
    return most < _TELLING or most < 2 * found[language] + 1


def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode: LATIN, CYRILLIC, CJK…"""
    return name(letter, "UNKNOWN").partition(" ")[0].partition("-")[0]


@cache
def _languages() -> Mapping[str, Mapping[str, frozenset[str]]]:
    listed = yaml.safe_load(resources.files("speechgpt.language").joinpath("spoken_languages.yaml").read_text("utf-8"))
    return {
        each: {"scripts": frozenset(facts["scripts"].split()), "words": frozenset(facts.get("words", "").split())}
        for each, facts in listed.items()
    }


def _facts(language: str) -> Mapping[str, frozenset[str]]:
    return _languages()[language]
