"""The script of a recipe's closed world: who is to speak which sentence."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol, TypeVar

from speechgpt.language.world import Question
from speechgpt.speech.config import VoicesSection

Role = Literal["question", "answer", "reading"]


class Categorised(Protocol):
    """Anything that can be drawn evenly by category."""

    @property
    def id(self) -> str: ...

    @property
    def category(self) -> str: ...


Drawn = TypeVar("Drawn", bound=Categorised)


@dataclass(frozen=True)
class Prompt:
    """One clip that a voice is to speak. `stranger` marks voices that only evaluation hears."""

    id: str
    text: str
    voice: str
    role: Role
    category: str
    question_id: str
    answer: str
    split: Literal["train", "heldout"]
    stranger: bool
    language: str = "en"
    """Empty if it is not known."""


def script(
    questions: Sequence[Question],
    readings: Sequence[str],
    voices: VoicesSection,
    held_out: int,
    seed: int,
    word_lists: Sequence[str] = (),
) -> list[Prompt]:
    """Everything that training and evaluation need to hear, sorted by id; the same for the same arguments.

    A training question is spoken by `voices.clips_per_question` voices that the seed draws. `held_out` questions (0:
    all of them), spread evenly over the categories, are spoken by every examined voice and every stranger. Each answer
    of a training question is spoken once, by the answer voice; so is each reading and word list, and a third of the
    readings and all lists by another voice, too, so that recognition hears more than questions.
    """
    train = sorted((q for q in questions if q.split == "train"), key=lambda q: q.id)
    unheard = spread([q for q in questions if q.split == "heldout"], held_out or None, seed)
    speakers = sorted(voices.questions)
    prompts = []
    for question in train:
        drawn = _drawn(voices, voices.clips_per_question, random.Random(f"{seed}:{question.id}"))
        prompts += [_question(question, voice, stranger=False) for voice in drawn]
    examined = [voice for voice in speakers if voices.questions[voice].examined]
    for question in unheard:
        prompts += [_question(question, voice, stranger=False) for voice in examined]
        prompts += [_question(question, voice, stranger=True) for voice in sorted(voices.held_out)]
    prompts += _answers(train, voices.answer)
    prompts += _readings([*readings, *word_lists], [*readings[::3], *word_lists], voices, seed)
    return sorted(prompts, key=lambda prompt: prompt.id)


def spread(items: Sequence[Drawn], count: int | None, seed: int) -> list[Drawn]:
    """`count` of the items (None: all), drawn by the seed and as evenly over the categories as they allow."""
    by_category: dict[str, list[Drawn]] = {}
    for item in sorted(items, key=lambda each: each.id):
        by_category.setdefault(item.category, []).append(item)
    for category, members in sorted(by_category.items()):
        random.Random(f"{seed}:{category}").shuffle(members)
    rounds = zip_longest(*(by_category[category] for category in sorted(by_category)))
    return [item for members in rounds for item in members if item is not None][:count]


def _drawn(voices: VoicesSection, count: int, draw: random.Random) -> list[str]:
    """`count` voices, or all, none twice, by their shares (Efraimidis and Spirakis, 2006)."""
    keys = {name: draw.random() ** (1 / section.share) for name, section in sorted(voices.questions.items())}
    return sorted(keys, key=lambda name: keys[name], reverse=True)[:count]


def _question(question: Question, voice: str, stranger: bool) -> Prompt:
    return Prompt(
        id=f"question-{question.id}-{voice}",
        text=question.question,
        voice=voice,
        role="question",
        category=question.category,
        question_id=question.id,
        answer=question.answer,
        split=question.split,
        stranger=stranger,
        language=question.language,
    )


def _answers(questions: Iterable[Question], voice: str) -> list[Prompt]:
    """One prompt for each different answer; its category and language are those of the first question with it."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.answer, question)
    return [_spoken("answer", text, voice, asked.category, asked.language) for text, asked in first.items()]


def _readings(texts: Sequence[str], twice: Sequence[str], voices: VoicesSection, seed: int) -> list[Prompt]:
    """Texts by the answer voice, and those to be read twice by another one."""
    others = sorted(set(voices.questions) - {voices.answer})
    shares = [voices.questions[name].share for name in others]
    prompts = [_spoken("reading", text, voices.answer, "reading") for text in texts]
    if others:
        draw = random.Random(f"{seed}:readings")
        prompts += [_spoken("reading", text, draw.choices(others, shares)[0], "reading") for text in twice]
    return prompts


def _spoken(role: Role, text: str, voice: str, category: str, language: str = "en") -> Prompt:
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Prompt(f"{role}-{name}-{voice}", text, voice, role, category, "", "", "train", False, language)
