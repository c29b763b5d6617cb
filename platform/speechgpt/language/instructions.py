"""Instruction rows in the form of SpeechInstruct (SPEC 1.2): what the three stages are taught with.

Every choice that is left to chance (task, wording, earlier turn) is drawn from the seed and the row's own id, so that a
row is the same whichever worker makes it and whatever else is made.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from speechgpt.language.config import InstructionsSection
from speechgpt.language.conversations import AskedTurn, Conversation, Pair
from speechgpt.language.prompts import Exchange, Kind, PromptFormat, descriptions, row_text
from speechgpt.language.segments import Speech, find_marker, write


class Row(NamedTuple):
    """One training row; the trained string is `prefix + plain_text`. kind: a template, or `units` alone."""

    id: str
    kind: str
    prefix: str
    plain_text: str
    category: str
    split: str


class Refusal(NamedTuple):
    """Something that no row was made from.

    reason: `marker`, `long_answer`, `no_answer_speech`, `no_text` (a clip that gives its units alone), `unspoken` (a
    text that no units came of), of a whole clip why it is not learnt from, of a published row what
    `interop.instruction_rows` lists, of a question set's what `language.question_filter` does.
    detail: where it is, and what is wrong with it, for people; never what it says.
    """

    source: str
    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Utterance:
    """A clip in units."""

    id: str
    units: tuple[int, ...]
    text: str = ""
    category: str = ""
    answer: str = ""
    """What the clip should get back, if it is a question."""
    is_answer_voice: bool = False
    """Spoken by the voice that the model answers in."""
    earlier: tuple[Pair, ...] = ()
    """Of a question within a dialogue: what was said before it."""


@dataclass(frozen=True)
class WrittenQuestion:
    """A question and answer in text."""

    id: str
    category: str
    question: str
    answer: str


FROM_SPEECH: tuple[Kind, ...] = ("s2s", "s2t", "direct", "standard")
FROM_TEXT: tuple[Kind, ...] = ("t2s", "t2t")
TO_SPEECH: tuple[Kind, ...] = ("s2s", "t2s", "direct", "standard")
_WITHOUT_QUESTION: tuple[Kind, ...] = ("direct", "standard")
"""Forms whose rows do not write down what is asked."""


@dataclass(frozen=True)
class RowBuilder:
    """Makes rows in one prompt format.

    spoken_answers: units of the answer voice for each answer text.
    past: what multi-turn rows draw their first turn from.
    """

    prompts: PromptFormat
    section: InstructionsSection
    seed: int
    spoken_answers: Mapping[str, tuple[int, ...]]
    past: Sequence[WrittenQuestion] = ()

    def of_utterance(self, clip: Utterance) -> Iterator[Row | Refusal]:
        """Its units alone; recognition or speaking; and, for a question, the chains that start from speech.

        The paper makes each unit-text pair a recognition row with probability p and else a speaking row. Speaking is
        only taught in the answer voice, so that other voices' clips are always recognised.
        """
        yield Row(f"units-{clip.id}", "units", "", write([Speech(clip.units)]), clip.category, "train")
        text = clip.text.strip()
        if not text:
            # Or `speak`: it would be one of them.
            yield Refusal(clip.id, "transcribe", "no_text")
            return
        draw = self._draw(f"cross-modal-{clip.id}")
        if clip.is_answer_voice and draw.random() >= self.section.transcribe_probability:
            task = Exchange("speak", question=text, answer_units=clip.units, description=self._describe("speak", draw))
        else:
            wording = self._describe("transcribe", draw)
            task = Exchange("transcribe", answer=text, question_units=clip.units, description=wording)
        yield self._row(clip.id, clip.category, task)
        if clip.answer.strip():
            chain = Exchange("s2s", question=text, answer=clip.answer.strip(), question_units=clip.units)
            yield from self._chains(clip.id, clip.category, chain, FROM_SPEECH, clip.earlier)

    def of_question(self, written: WrittenQuestion) -> Iterator[Row | Refusal]:
        """Its text row, and the chains that start from text."""
        asked = Exchange("text", question=written.question.strip(), answer=written.answer.strip())
        yield self._row(written.id, written.category, asked)
        yield from self._chains(written.id, written.category, asked, FROM_TEXT)

    def of_conversation(self, talk: Conversation, kinds: Sequence[Kind] = FROM_TEXT) -> Iterator[Row | Refusal]:
        """Its text row, whole, and for each of its turns the chains that start from text; or of them these kinds."""
        yield self._row(talk.id, talk.category, *(Exchange("text", said, answer) for said, answer in talk.turns))
        for turn in talk.asked(self.section.questions.history, self.section.max_answer_words):
            asked = Exchange("text", question=turn.question, answer=turn.answer)
            yield from self._chains(turn.id, talk.category, asked, kinds, turn.earlier)

    def of_written_speech(
        self, turn: AskedTurn, category: str, question_units: tuple[int, ...], answer_units: tuple[int, ...]
    ) -> Iterator[Row | Refusal]:
        """The chains that begin or end in speech, of units that were made without sound. Empty units were not made."""
        asked = Exchange("text", turn.question, turn.answer, question_units, answer_units)
        for kind in ("s2s", "s2t", "direct", "standard", "t2s"):
            if kind not in self.section.forms:
                continue
            if (kind in FROM_SPEECH and not question_units) or (kind in TO_SPEECH and not answer_units):
                yield Refusal(turn.id, kind, "unspoken")
            else:
                yield from self._chains(turn.id, category, asked, (kind,), turn.earlier)

    def _chains(
        self, source: str, category: str, asked: Exchange, kinds: Sequence[Kind], given: Sequence[Pair] = ()
    ) -> Iterator[Row | Refusal]:
        long = len(asked.answer.split()) >= self.section.max_answer_words
        for kind in kinds:
            if kind not in self.section.forms:
                continue
            if long:
                yield Refusal(source, kind, "long_answer")
                continue
            aloud = kind in TO_SPEECH
            spoken = (asked.answer_units or self.spoken_answers.get(asked.answer, ())) if aloud else ()
            if aloud and not spoken:
                yield Refusal(source, kind, "no_answer_speech")
                continue
            heard = asked.question_units if kind in FROM_SPEECH else ()
            question = "" if kind in _WITHOUT_QUESTION else asked.question
            answer = "" if kind == "standard" else asked.answer
            exchange = Exchange(kind, question, answer, heard, spoken)
            earlier = [Exchange("t2t", said, answer) for said, answer in given]
            yield self._row(source, category, *(earlier or self._earlier(f"{kind}-{source}", asked.question)), exchange)

    def _earlier(self, row: str, question: str) -> list[Exchange]:
        """The turn before, for the share of the rows that has one; as text, which is how dialogues are remembered."""
        draw = self._draw(f"turns-{row}")
        others = self.past if draw.random() < self.section.multi_turn else ()
        for _ in range(min(len(others), 8)):
            other = draw.choice(others)
            words = len(other.answer.split())
            if other.question != question and words < self.section.max_answer_words and not _marker(other):
                return [Exchange("t2t", question=other.question.strip(), answer=other.answer.strip())]
        return []

    def _row(self, source: str, category: str, *exchanges: Exchange) -> Row | Refusal:
        kind = exchanges[-1].kind
        # Text that spells a marker would come back from the row's string as a control token.
        if any(find_marker(text) for exchange in exchanges for text in (exchange.question, exchange.answer)):
            return Refusal(source, kind, "marker")
        text = row_text(self.prompts.dialect, [self.prompts.worded(exchange) for exchange in exchanges])
        return Row(f"{kind}-{source}", kind, self.prompts.prefix, text, category, "train")

    def _describe(self, task: str, draw: random.Random) -> str:
        wordings = descriptions("transcribe" if task == "transcribe" else "speak")
        return draw.choice(wordings[: self.section.descriptions])

    def _draw(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}:{name}")


def _marker(written: WrittenQuestion) -> bool:
    return find_marker(written.question) is not None or find_marker(written.answer) is not None


EXAMPLES = 5
"""Ids that a tally keeps of each reason."""


def tally(made: Iterable[Row | Refusal]) -> dict[str, dict[str, Any]]:
    """{"rows": {kind: count}, "refused": {"kind: reason": count}, "examples": {"kind: reason": [first ids]}}."""
    rows: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for item in made:
        if isinstance(item, Row):
            rows[item.kind] += 1
            continue
        why = f"{item.kind}: {item.reason}"
        refused[why] += 1
        if refused[why] <= EXAMPLES:
            examples.setdefault(why, []).append(item.source)
    counted: dict[str, dict[str, Any]] = {"rows": rows, "refused": refused, "examples": examples}
    return {key: dict(sorted(values.items())) for key, values in counted.items()}


def total(tallies: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Tallies added up, in the order given: counts, and the first examples."""
    sums: dict[str, Counter[str]] = {"rows": Counter(), "refused": Counter()}
    examples: dict[str, list[str]] = {}
    for each in tallies:
        for key, counts in sums.items():
            counts.update(each[key])
        for why, ids in each["examples"].items():
            examples[why] = (examples.get(why, []) + list(ids))[:EXAMPLES]
    return {key: dict(sorted(counts.items())) for key, counts in sums.items()} | {
        "examples": dict(sorted(examples.items()))
    }
