"""What a model is asked in an evaluation, and what it gives back. Decoding is greedy: a score comes out the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from speechgpt.language.answers import Answer
from speechgpt.language.config import GenerationSection, ReplyForm
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import Turn
from speechgpt.language.segments import Segment, Speech

Group = str
"""In a workspace `seen` (a voice that training heard), `stranger` (one it did not) or `recording`; else `manifest`."""


@dataclass(frozen=True)
class Clip:
    """One utterance. text: what is said; answer: what a question should get back; None if not known."""

    id: str
    group: Group
    speaker: str
    text: str | None
    answer: str | None
    category: str
    units: tuple[int, ...]


class UnitLoss(NamedTuple):
    """Negative log-likelihood, in nats, of a clip's units, summed over its `tokens` units."""

    nats: float
    tokens: int


_LOSS_ROWS = 8


class Examiner:
    """Asks one model (Hugging Face layout, perhaps with a PEFT adapter on top).

    A clip too long for the model's context counts as not understood: empty words, no answer.
    """

    def __init__(self, directory: str, adapter: str | None, generation: GenerationSection) -> None:
        self.model = SpeechLanguageModel.load(directory, adapter)
        self.generation = generation.model_copy(update={"temperature": 0.0})
        self._context: int = getattr(self.model.model.config, "max_position_embeddings", 1 << 20)

    def transcribe(self, clips: Sequence[Clip]) -> list[str]:
        fitting = [clip for clip in clips if clip.units and self._fits(self.model.prompts.transcription(clip.units))]
        texts = dict(
            zip(
                (c.id for c in fitting), self.model.transcribe([c.units for c in fitting], self.generation), strict=True
            )
        )
        return [texts.get(clip.id, "") for clip in clips]

    def answer(self, clips: Sequence[Clip], form: ReplyForm) -> list[Answer]:
        """The reply to each clip as a spoken question."""
        turns = {clip.id: [Turn("user", units=clip.units)] for clip in clips if clip.units}
        fitting = [
            clip for clip in clips if clip.units and self._fits(self.model.prompts.dialogue(turns[clip.id], form))
        ]
        asked = [turns[clip.id] for clip in fitting]
        replies = dict(zip((clip.id for clip in fitting), self.model.answer(asked, form, self.generation), strict=True))
        return [replies.get(clip.id, Answer(None, None, None, False, "length")) for clip in clips]

    def answer_typed(self, clips: Sequence[Clip]) -> list[str]:
        """The text reply to each clip's words, typed."""
        asked = [[Turn("user", text=clip.text or "")] for clip in clips]
        return [reply.text or "" for reply in self.model.answer(asked, "text", self.generation)]

    @torch.inference_mode()
    def unit_losses(self, clips: Sequence[Clip]) -> list[UnitLoss]:
        """How well the model foretells each clip's units, given those before them and `<sosp>`."""
        losses: list[UnitLoss] = []
        for start in range(0, len(clips), _LOSS_ROWS):
            losses += self._losses(clips[start : start + _LOSS_ROWS])
        return losses

    def _losses(self, clips: Sequence[Clip]) -> list[UnitLoss]:
        vocabulary, model = self.model.vocabulary, self.model.model
        rows = [vocabulary.encode_prompt([Speech(clip.units)])[: self._context] for clip in clips]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [vocabulary.pad] * (longest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
        scores = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        units = (ids >= vocabulary.first_unit) & (ids < vocabulary.first_unit + vocabulary.unit_count)
        counted = units[:, 1:] & mask[:, 1:].bool()
        return [UnitLoss(float(n[c].sum()), int(c.sum())) for n, c in zip(nats, counted, strict=True)]

    def _fits(self, prompt: Sequence[Segment]) -> bool:
        return len(self.model.vocabulary.encode_prompt(prompt)) < self._context
