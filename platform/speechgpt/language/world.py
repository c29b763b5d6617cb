"""A closed world of questions and answers, from a YAML file of facts and wordings (`worlds/nano.yaml` explains it)."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from speechgpt.language.config import WorldSection
from speechgpt.language.numbers import in_words
from speechgpt.section import Section

Split = Literal["train", "heldout"]
OUTSIDE = "outside"
_LIST = 7
"""Words in a list."""


class WorldError(ValueError):
    """A world file that cannot be used; the message names the file and the topic."""


@dataclass(frozen=True)
class Question:
    """One wording of a question. Questions with the same `fact` ask for the same thing in other words."""

    id: str
    category: str
    question: str
    answer: str
    split: Split
    fact: str = ""
    language: str = "en"
    """As its row or its set says; empty if neither does. Worlds are English."""


class NumbersSource(Section):
    """All pairs of numbers (inclusive ranges) whose result lies in a range, too."""

    operation: Literal["plus", "minus", "times", "larger", "smaller"]
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]

    def facts(self) -> Iterator[tuple[str, dict[str, str]]]:
        for a, b in product(range(self.a[0], self.a[1] + 1), range(self.b[0], self.b[1] + 1)):
            match self.operation:
                case "plus":
                    c = a + b
                case "minus":
                    c = a - b
                case "times":
                    c = a * b
                case "larger" | "smaller":
                    if a >= b:
                        # Both orders of a pair are wordings of one fact.
                        continue
                    c = b if self.operation == "larger" else a
            if self.c[0] <= c <= self.c[1]:
                yield f"{self.operation} {a} {b}", {"a": in_words(a), "b": in_words(b), "c": in_words(c)}


class Topic(Section):
    """Facts of one kind, and how they are asked for."""

    category: str = Field(pattern=r"^[a-z]+$")
    ask: tuple[str, ...] = Field(min_length=1)
    also: tuple[str, ...] = ()
    """Further wordings, which a recipe may ask in, too."""
    answer: str
    numbers: NumbersSource | None = None
    table: dict[str, str] | None = None
    both_ways: bool = False
    """Also ask for a table's keys by their values."""
    cycle: tuple[str, ...] | None = None
    members: dict[str, tuple[str, ...]] | None = None
    denials: int = 1
    """Groups that each member is said not to belong to."""
    denial: str = ""
    words: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Topic":
        given = [name for name in ("numbers", "table", "cycle", "members", "words") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a topic has one of numbers, table, cycle, members or words; this one has {given}")
        if self.members is not None and (not self.denial or not 0 <= self.denials < len(self.members)):
            raise ValueError("members need a `denial`, and fewer `denials` than there are groups")
        return self

    def facts(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """(fact, answer wording, slots)."""
        if self.numbers is not None:
            for fact, slots in self.numbers.facts():
                yield fact, self.answer, slots
        elif self.table is not None:
            pairs = list(self.table.items())
            for key, value in pairs + ([(value, key) for key, value in pairs] if self.both_ways else []):
                yield key, self.answer, {"key": key, "value": value}
        elif self.cycle is not None:
            for place, this in enumerate(self.cycle):
                yield this, self.answer, {"this": this, "next": self.cycle[(place + 1) % len(self.cycle)]}
        elif self.members is not None:
            yield from self._memberships(self.members)
        else:
            for word in self.words or ():
                yield word, self.answer, {"word": word}

    def _memberships(self, members: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, dict[str, str]]]:
        groups = list(members)
        for group, names in members.items():
            others = [other for other in groups if other != group]
            for place, member in enumerate(names):
                yield f"{member} {group}", self.answer, {"member": member, "group": group}
                for turn in range(self.denials):
                    # Taking turns lets every group be denied about equally often.
                    other = others[(place * self.denials + turn) % len(others)]
                    yield f"{member} {other}", self.denial, {"member": member, "group": other}


class Outside(Section):
    """Questions that the world has no answer to."""

    answer: str
    ask: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]


class Readings(Section):
    """General sentences to be read aloud."""

    patterns: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]


class WorldFile(Section):
    topics: tuple[Topic, ...]
    outside: Outside | None = None
    readings: Readings | None = None


class World:
    """The questions of a world file, split for training and evaluation by a seed."""

    def __init__(self, file: WorldFile, section: WorldSection, seed: int) -> None:
        self._file = file
        self._held_out = section.held_out
        self._seed = seed
        self._questions = self._split(
            _limit(_inside(file.topics, section.wordings == "all"), section.max_questions, seed)
        )

    def questions(self) -> list[Question]:
        """The world's questions, sorted by id. Held-out ones ask in new words for facts that training knows."""
        return self._questions

    def outside(self) -> list[Question]:
        """Questions that the world cannot answer, split like its own; their category is `outside`."""
        if self._file.outside is None:
            return []
        found = []
        for pattern in self._file.outside.ask:
            for question in _combinations(pattern, self._file.outside.slots):
                found.append(_question(OUTSIDE, question, self._file.outside.answer, pattern))
        return self._split(found)

    def readings(self, n: int, seed: int) -> list[str]:
        """`n` different general sentences, or all there are if that is fewer."""
        if self._file.readings is None:
            return []
        readings = self._file.readings
        every = [sentence for pattern in readings.patterns for sentence in _combinations(pattern, readings.slots)]
        return random.Random(seed).sample(every, min(n, len(every)))

    def word_lists(self, n: int, seed: int) -> list[str]:
        """`n` lists of seven of the world's words, dealt so that each comes about equally often."""
        asked = [*self.questions(), *self.outside()]
        words = sorted({word for q in asked for text in (q.question, q.answer) for word in text.split()})
        if not words:
            return []
        draw = random.Random(seed)
        dealt: list[str] = []
        while len(dealt) < n * _LIST:
            dealt += draw.sample(words, len(words))
        return [" ".join(dealt[i * _LIST : (i + 1) * _LIST]) for i in range(n)]

    def _split(self, questions: Sequence[Question]) -> list[Question]:
        """Hold out the same share of every category, and leave each fact a wording in training if it has several."""
        held: set[str] = set()
        wordings: dict[str, int] = {}
        for question in questions:
            wordings[question.fact] = wordings.get(question.fact, 0) + 1
        left = dict(wordings)
        seen = 0
        for category in sorted({question.category for question in questions}):
            members = [question for question in questions if question.category == category]
            # Rounding the running total keeps the whole share right even when categories are small.
            quota = round((seen + len(members)) * self._held_out) - round(seen * self._held_out)
            seen += len(members)
            for question in sorted(members, key=lambda q: _draw(self._seed, q.id)):
                if quota and (left[question.fact] > 1 or wordings[question.fact] == 1):
                    held.add(question.id)
                    left[question.fact] -= 1
                    quota -= 1
        split: dict[bool, Split] = {True: "heldout", False: "train"}
        return sorted(
            (Question(q.id, q.category, q.question, q.answer, split[q.id in held], q.fact) for q in questions),
            key=lambda q: q.id,
        )


def load(section: WorldSection, seed: int) -> World:
    """Read the world that a recipe names: a shipped one, or a YAML file. Raises WorldError."""
    text = _read(section.file)
    try:
        file = WorldFile.model_validate(yaml.safe_load(text))
        return World(file, section, seed)
    except yaml.YAMLError as error:
        raise WorldError(f"world {section.file}: not YAML: {error}") from None
    except ValidationError as error:
        places = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WorldError(f"world {section.file}: {places}") from None
    except WorldError as error:
        raise WorldError(f"world {section.file}: {error}") from None


def _read(name: str) -> str:
    shipped = resources.files("speechgpt.language").joinpath("worlds", f"{name}.yaml")
    if shipped.is_file():
        return shipped.read_text("utf-8")
    if not Path(name).is_file():
        raise WorldError(f"world {name!r}: neither a shipped world nor a file")
    return Path(name).read_text("utf-8")


def _inside(topics: Sequence[Topic], all_wordings: bool) -> list[Question]:
    questions: dict[str, Question] = {}
    for number, topic in enumerate(topics):
        for fact, answer, slots in topic.facts():
            for pattern in topic.ask + topic.also * all_wordings:
                made = _question(topic.category, _say(pattern, slots), _say(answer, slots), f"{number} {fact}")
                other = questions.setdefault(made.id, made)
                if other is not made and (other.answer, other.fact) != (made.answer, made.fact):
                    raise WorldError(
                        f"topics.{number} ({topic.category}): {made.question!r} is asked twice, "
                        f"with the answers {other.answer!r} and {made.answer!r}"
                    )
    return list(questions.values())


def _limit(questions: Sequence[Question], most: int, seed: int) -> list[Question]:
    """At most `most` questions (0: all), facts whole and drawn evenly over the categories."""
    if not most:
        return list(questions)
    facts: dict[str, list[Question]] = {}
    for question in questions:
        facts.setdefault(question.fact, []).append(question)
    turns: dict[str, int] = {}
    ranked = []
    for fact, asked in sorted(facts.items(), key=lambda entry: _draw(seed, entry[0])):
        turn = turns[asked[0].category] = turns.get(asked[0].category, -1) + 1
        ranked.append((turn, _draw(seed, fact), asked))
    chosen: list[Question] = []
    for _, _, asked in sorted(ranked, key=lambda entry: entry[:2]):
        if len(chosen) + len(asked) <= most:
            chosen += asked
    return chosen


def _question(category: str, question: str, answer: str, fact: str) -> Question:
    return Question(f"{category}-{question.replace(' ', '-')}", category, question, answer, "train", fact)


def _combinations(pattern: str, slots: Mapping[str, Sequence[str]]) -> Iterator[str]:
    names = [name for _, name, _, _ in Formatter().parse(pattern) if name]
    if missing := [name for name in names if name not in slots]:
        raise WorldError(f"{pattern!r} has a slot {{{missing[0]}}}; the slots are {sorted(slots)}")
    for values in product(*(slots[name] for name in names)):
        yield _say(pattern, dict(zip(names, values, strict=True)))


class _Wording(Formatter):
    """`{thing:a}` puts the indefinite article before it."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "a":
            return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
        return super().format_field(value, format_spec)


def _say(pattern: str, slots: Mapping[str, str]) -> str:
    try:
        return _Wording().vformat(pattern, (), slots)
    except (KeyError, IndexError):
        raise WorldError(f"{pattern!r} has a slot that its facts do not give; they give {sorted(slots)}") from None
    except ValueError as error:
        raise WorldError(f"{pattern!r} is no pattern: {error}") from None


def _draw(seed: int, key: str) -> bytes:
    """An order that looks random and is the same on every machine and in every run."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()
