"""Recipe section of the evaluation room."""

from typing import Literal

from pydantic import Field

from speechgpt.section import Section


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
