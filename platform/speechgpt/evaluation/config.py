"""Recipe sections of the evaluation room."""

from typing import Literal

from pydantic import Field, field_validator

from speechgpt.section import Section
from speechgpt.speech.config import HttpServiceSection

Form = Literal["s2s", "s2t", "t2s", "t2t"]
"""Speech or text in, speech or text out."""
Ears = Literal["own", "recogniser"]


class EvaluationSection(Section):
    questions: int = Field(60, ge=0)
    """Held-out questions asked of each voice; 0 takes all."""
    judged_clips: int = Field(50, ge=0)
    """Clips an independent recogniser listens to, for each metric."""
    by_voice: int = Field(0, ge=0)
    """Clips of the answer voice, and as many of voices never heard, whose resynthesis is judged apart; and spoken
    answers that are set beside the answer voice itself saying them. 0: none."""
    recogniser: Literal["whisper-tiny", "whisper-base", "none"] | str = "whisper-tiny"
    """A packaged recogniser, a CTranslate2 directory, or `none` (the judged metrics are then null)."""
    bootstrap: int = Field(1000, ge=0)
    stage_clips: int = Field(30, ge=0)
    """Held-out spoken questions that the model of each stage is asked: so many in voices that training heard, and so
    many in others."""
    stages: bool = True
    """Also measure the model of each training stage, to show where it started."""


class JudgeSection(HttpServiceSection):
    """A language model that gives answers their scores, by `POST URL/chat/completions`."""

    model: str = Field(min_length=1)
    together: int = Field(8, ge=1)
    """Answers that it is asked about at a time."""
    shows_right_answer: bool = True
    """Whether it sees the right answer, where one is known. The paper's judge saw the question and the answer alone."""


class InstructionFollowingSection(Section):
    """The paper's evaluation: spoken or typed questions, spoken or written answers, each with a score from 1 to 5."""

    questions: int = Field(100, ge=1)
    """Held-out questions, each in one voice, spread over the categories; the paper asked 100."""
    voices: Literal["held-out", "heard", "all"] = "held-out"
    """Whose questions: of voices that no training heard (if the recipe has none, of all), that training heard, or all.
    """
    forms: tuple[Form, ...] = Field(("s2s", "s2t", "t2s", "t2t"), min_length=1)
    judge: JudgeSection | None = None
    """Without one, rules give the scores: they know the right answers and need nobody."""
    cascade: tuple[Ears, ...] = ("own", "recogniser")
    """Cascades of the same models that the chain is measured against: `own` lets the model write down the question,
    answer what it reads, and read that aloud, in three requests; in `recogniser` the independent one writes it down."""
    ablation: bool = True
    """Also ask for speech without a word before it: what the chain of modality is worth (SPEC 7)."""
    standard: str = ""
    """A bundle with the same encoder whose chain stage was trained on rows of kind `standard`: the other half of the
    ablation."""
    tasks: int = Field(50, ge=0)
    """Questions of each task that is asked for without a grammar; 0: none."""
    retention: int = Field(100, ge=0)
    """Typed questions that the model of each stage is asked; 0: none."""

    @field_validator("forms", "cascade")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"each can be named once; these are {', '.join(names)}")
        return names
