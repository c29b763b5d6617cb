"""How SpeechGPT is asked and answers: the two dialects, as data.

`released` is what the published weights were trained on (SPEC 1.4), `paper` what the paper prints (SPEC 1.3). A
template is the training row; a prompt is the same template up to `[SpeechGPT]:`, so that a model is asked exactly as
it was taught.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Literal, get_args

import yaml

from speechgpt.language.config import Dialect, LanguageSection, ReplyForm, TextForm
from speechgpt.language.normaliser import spoken
from speechgpt.language.segments import SPEECHGPT, Plain, Segment, Speech, Template, write
from speechgpt.speech.units import parse_units

META = (
    "You are an AI assistant whose name is SpeechGPT.\n- SpeechGPT is a intrinsic cross-modal conversational language "
    "model that is developed by Fudan University.  SpeechGPT can understand and communicate fluently with human "
    "through speech or text chosen by the user.\n- It can perceive cross-modal inputs and generate cross-modal "
    "outputs.\n"
)
"""The published prefix, letter for letter."""
PREFIXES: Mapping[str, str] = {"": "", "speechgpt": META}

Kind = Literal["transcribe", "speak", "text", "s2s", "s2t", "t2s", "t2t", "direct", "standard"]
"""The tasks: cross-modal (recognition, speaking), text alone, the four chain-of-modality forms (speech or text in,
speech or text out), `direct`, which is `s2s` with the transcript left out, and `standard`, which is `s2s` without any
text: what the paper measures the chain against (SPEC 7)."""

# Slots: description, question and answer are text; question_units and answer_units are speech.
# Descriptions carry their own final punctuation.
_PAPER: Mapping[Kind, str] = {
    "transcribe": "[Human]:{description} This is input: {question_units}<eoh>.[SpeechGPT]: {answer}<eos>.",
    "speak": "[Human]:{description} This is input: {question}<eoh>.[SpeechGPT]: {answer_units}<eos>.",
    "text": "[Human]: {question}<eoh>. [SpeechGPT]: {answer}<eoa>.",
    "s2s": "[Human]: This is a speech instruction: {question_units}. And your response should be speech. You can do it "
    "step by step. You can first transcribe the instruction and get the text Instruction. Then you can think about the "
    "instruction and get the text response. Last, you should speak the response aloud <eoh>. "
    "[SpeechGPT]: [tq] {question}; [ta] {answer}; [ua] {answer_units}<eoa>.",
    "s2t": "[Human]: This is a speech instruction: {question_units}. And your response should be text. You can do it "
    "step by step. You can first transcribe the instruction and get the text instruction. Then you can think about the "
    "instruction and get the text response. <eoh>. [SpeechGPT]: [tq] {question}; [ta] {answer}<eoa>.",
    "t2s": "[Human]: This is a text instruction: {question}. And your response should be speech. You can do it step by "
    "step. You can think about the instruction and get the text response. Then you should speak the response aloud "
    "<eoh>. [SpeechGPT]: [ta] {answer}; [ua] {answer_units}<eoa>.",
    # The paper's text form, as remembered in SPEC 1.3, has no <eoh>; a turn needs its end, so it gets the others'.
    "t2t": "[Human]: This is a text instruction: {question}. And your response should be text. You can think about the "
    "instruction and get the text response. <eoh>. [SpeechGPT]: [ta] {answer}<eoa>.",
    "direct": "[Human]: This is a speech instruction: {question_units}. And your response should be speech. <eoh>. "
    "[SpeechGPT]: [ta] {answer}; [ua] {answer_units}<eoa>.",
    "standard": "[Human]: This is a speech instruction: {question_units}. And your response should be speech. <eoh>. "
    "[SpeechGPT]: {answer_units}<eoa>.",
}
# The published rows are cross-modal, spoken chains and (unverified) text; the other forms follow the pattern of those.
_RELEASED: Mapping[Kind, str] = {
    "transcribe": "[Human]: {description} This is input: {question_units}<eoh> [SpeechGPT]: {answer}<eoa> ",
    "speak": "[Human]: {description} This is input: {question}<eoh> [SpeechGPT]: {answer_units}<eoa> ",
    "text": "[Human]: {question}<eoh> [SpeechGPT]: {answer}<eoa>",
    "s2s": "[Human]: {question_units}<eoh>. [SpeechGPT]: {question}; [ta] {answer}; [ua] {answer_units}<eoa>.",
    "s2t": "[Human]: {question_units}<eoh>. [SpeechGPT]: {question}; [ta] {answer}<eoa>.",
    "t2s": "[Human]: {question}<eoh>. [SpeechGPT]: [ta] {answer}; [ua] {answer_units}<eoa>.",
    "t2t": "[Human]: {question}<eoh>. [SpeechGPT]: [ta] {answer}<eoa>.",
    "direct": "[Human]: {question_units}<eoh>. [SpeechGPT]: [ta] {answer}; [ua] {answer_units}<eoa>.",
    "standard": "[Human]: {question_units}<eoh>. [SpeechGPT]: {answer_units}<eoa>.",
}
TEMPLATES: Mapping[Dialect, Mapping[Kind, str]] = {"paper": _PAPER, "released": _RELEASED}
_SPEECH_SLOTS = {"question_units", "answer_units"}


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, as far as its kind needs them; `transcribe` answers with the transcript."""

    kind: Kind
    question: str = ""
    answer: str = ""
    question_units: tuple[int, ...] = ()
    answer_units: tuple[int, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class Turn:
    """One side of a dialogue, in text, in units, or (a transcribed question, a spoken answer) in both."""

    role: Literal["user", "assistant"]
    text: str | None = None
    units: Sequence[int] | None = None


Dialogue = Sequence[Turn]


@dataclass(frozen=True)
class PromptFormat:
    """All that must be equal between a model's training rows and its prompts; saved beside its weights."""

    FILE = "prompt_format.json"

    dialect: Dialect = "released"
    prefix: str = META
    text: TextForm = "written"
    """The form of what the model reads."""
    transcribe: str = ""
    """Task description that recognition is asked with; empty takes the first of the list."""
    speak: str = ""

    @classmethod
    def of(cls, section: LanguageSection) -> "PromptFormat":
        """The format that a recipe asks for."""
        return cls(section.dialect, PREFIXES[section.prefix], section.text)

    def save(self, directory: str | Path) -> None:
        Path(directory, self.FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "PromptFormat":
        """Read what `save` wrote. Raises FileNotFoundError naming the file, which published models do not have."""
        return cls(**json.loads(Path(directory, cls.FILE).read_text()))

    def transcription(self, units: Sequence[int]) -> list[Segment]:
        """Prompt that asks for the words of speech."""
        description = self.transcribe or descriptions("transcribe")[0]
        return self.ask(Exchange("transcribe", question_units=tuple(units), description=description))

    def speaking(self, text: str) -> list[Segment]:
        """Prompt that asks for text to be read aloud."""
        return self.ask(Exchange("speak", question=text, description=self.speak or descriptions("speak")[0]))

    def dialogue(self, turns: Dialogue, form: ReplyForm) -> list[Segment]:
        """Prompt for the answer to the last turn.

        Earlier turns are remembered as text (units would soon fill the context), so that spoken ones need their
        transcript. Raises ValueError for turns that do not alternate, or lack the words or units they need.
        """
        *earlier, last = _pairs(turns)
        exchanges = [_remembered(number, question, answer) for number, (question, answer) in enumerate(earlier)]
        question = last[0]
        past = [segment for exchange in exchanges for segment in (*self.filled(exchange), Template(" "))]
        asked = Exchange(
            kind_of(question, form), question=question.text or "", question_units=tuple(question.units or ())
        )
        return [Template(self.prefix), *past, *self._question(asked)]

    def worded(self, exchange: Exchange) -> Exchange:
        """Its texts in the form that the model reads."""
        if self.text == "written":
            return exchange
        return replace(exchange, question=spoken(exchange.question), answer=spoken(exchange.answer))

    def ask(self, exchange: Exchange, prefix: str | None = None) -> list[Segment]:
        """Prompt that asks for the exchange's answer; `prefix` is a row's own, if it is another than the model's."""
        return [Template(self.prefix if prefix is None else prefix), *self._question(exchange)]

    def filled(self, exchange: Exchange) -> list[Segment]:
        """A whole question and answer, without the prefix."""
        return fill(self.dialect, self.worded(exchange))

    def _question(self, exchange: Exchange) -> list[Segment]:
        return list(_fill(question_template(self.dialect, exchange.kind), self.worded(exchange)))


def kind_of(question: Turn, form: ReplyForm) -> Kind:
    """Which template asks for a reply of this form to this turn; `direct` to a text question is the plain chain."""
    spoken = question.units is not None
    if form == "text":
        return "s2t" if spoken else "t2t"
    if not spoken:
        return "t2s"
    return "direct" if form == "direct" else "s2s"


def question_template(dialect: Dialect, kind: Kind) -> str:
    """What is given to the model: the template up to the answer.

    For `direct` the answer's first tag is given too: it is what makes the model skip the transcript.
    """
    question, answer = _halves(dialect, kind)
    return question + (answer[: answer.index("{")] if kind == "direct" else "")


def answer_template(dialect: Dialect, kind: Kind) -> str:
    """What the model has to generate."""
    answer = _halves(dialect, kind)[1]
    return answer[answer.index("{") :] if kind == "direct" else answer


def fill(dialect: Dialect, exchange: Exchange) -> list[Segment]:
    """A whole question and answer, as in a training row."""
    return list(_fill(TEMPLATES[dialect][exchange.kind], exchange))


def row_text(dialect: Dialect, exchanges: Sequence[Exchange]) -> str:
    """`plain_text` of a SpeechInstruct row of one or more exchanges. Raises MarkerError for text with markers in it."""
    return " ".join(write(fill(dialect, exchange)) for exchange in exchanges)


def read_row(dialect: Dialect, plain_text: str) -> list[Exchange]:
    """The exchanges that a row's `plain_text` was made from.

    Raises ValueError for text that fits no template of the dialect. Text answers may span lines (SPEC 1.2).
    """
    # A turn starts with a marker that no plain text holds; the space before it joins two turns.
    turns = re.split(r" (?=\[Human\]:)", plain_text)
    exchanges = []
    for place, turn in enumerate(turns):
        # Cutting at the marker leaves a template's own last space on the row's last turn only.
        found = _read(dialect, turn) or (place < len(turns) - 1 and _read(dialect, turn + " "))
        if not found:
            raise ValueError(f"no {dialect} template reads {turn[:120]!r}")
        exchanges.append(found)
    return exchanges


@cache
def descriptions(kind: Literal["transcribe", "speak"]) -> tuple[str, ...]:
    """Wordings of the task, each with its final punctuation. The first is the one that inference uses."""
    listed = yaml.safe_load(resources.files("speechgpt.language").joinpath("descriptions.yaml").read_text("utf-8"))
    return tuple(listed[kind])


def _halves(dialect: Dialect, kind: Kind) -> tuple[str, str]:
    question, mark, answer = TEMPLATES[dialect][kind].partition(SPEECHGPT + ":")
    return question + mark + " ", answer.removeprefix(" ")


def _fill(template: str, exchange: Exchange) -> Iterator[Segment]:
    for literal, slot, _, _ in Formatter().parse(template):
        if literal:
            yield Template(literal)
        if slot is None:
            continue
        value = getattr(exchange, slot)
        if not value:
            raise ValueError(f"a row or prompt of kind {exchange.kind!r} needs {slot}, which is empty")
        yield Speech(tuple(int(unit) for unit in value)) if slot in _SPEECH_SLOTS else Plain(value)


def _read(dialect: Dialect, turn: str) -> Exchange | None:
    for kind, pattern in _patterns(dialect):
        if match := pattern.fullmatch(turn):
            found = match.groupdict(default="")
            return Exchange(
                kind,
                found.get("question", ""),
                found.get("answer", ""),
                tuple(parse_units(found.get("question_units", ""))),
                tuple(parse_units(found.get("answer_units", ""))),
                found.get("description", ""),
            )
    return None


@cache
def _patterns(dialect: Dialect) -> list[tuple[Kind, re.Pattern[str]]]:
    """The templates as patterns, those that ask most of a text first."""
    patterns: list[tuple[Kind, re.Pattern[str]]] = []
    for kind in get_args(Kind):
        pattern = ""
        for literal, slot, _, _ in Formatter().parse(TEMPLATES[dialect][kind]):
            pattern += re.escape(literal)
            if slot in _SPEECH_SLOTS:
                pattern += rf"(?P<{slot}><sosp>(?:<\d+>)+<eosp>)"
            elif slot:
                pattern += rf"(?P<{slot}>.+?)"
        patterns.append((kind, re.compile(pattern, re.DOTALL)))
    return sorted(patterns, key=lambda entry: -len(entry[1].pattern))


def _pairs(turns: Dialogue) -> list[tuple[Turn, Turn | None]]:
    """Questions with their answers; the last has none yet."""
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if len(turns) % 2 == 0 or [turn.role for turn in turns] != expected:
        raise ValueError(
            "a dialogue alternates user and assistant and ends with the user; "
            f"this one goes {', '.join(turn.role for turn in turns) or '(empty)'}"
        )
    return [(turns[place], turns[place + 1] if place + 1 < len(turns) else None) for place in range(0, len(turns), 2)]


def _remembered(number: int, question: Turn, answer: Turn | None) -> Exchange:
    if not question.text or answer is None or not answer.text:
        raise ValueError(f"exchange {number + 1} of the dialogue: history needs the text of both sides")
    return Exchange("t2t", question=question.text, answer=answer.text)


def with_transcript(turn: Turn, transcript: str) -> Turn:
    """A spoken turn together with its words, as history needs it."""
    return replace(turn, text=transcript)
