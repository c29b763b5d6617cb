"""Putting the paper's questions to a model: in every form, step by step, without a grammar, and in text alone."""

from collections.abc import Sequence

import torch

from speechgpt.evaluation import task_recognition
from speechgpt.evaluation.cascade import cascade
from speechgpt.evaluation.examination import Clip, Examiner, UnitLoss
from speechgpt.evaluation.task_recognition import Done, Task
from speechgpt.language.answers import Answer
from speechgpt.language.config import Dialect
from speechgpt.language.prompts import Exchange, Kind, PromptFormat
from speechgpt.language.segments import Plain, Segment, Template

NO_ROOM = Answer(None, None, None, False, "length")
"""What a question gets that fills the model's context, or that has nothing in it."""
_LOSS_ROWS = 16


class Interviewer(Examiner):
    """Asks one model; decoding is greedy. What does not fit its context gets `NO_ROOM`, and stops nobody."""

    def dialect(self) -> Dialect:
        return self.model.prompts.dialect

    def ask(self, clips: Sequence[Clip], kind: Kind) -> list[Answer]:
        """The reply to each clip's units or words, whichever the kind asks with."""
        return self._replies([_question(kind, clip) for clip in clips], kind)

    def cascade(self, clips: Sequence[Clip], transcripts: Sequence[str] | None, aloud: bool) -> list[Answer]:
        """The reply to each clip in separate steps. transcripts: what another recogniser wrote; None: the model does.
        aloud: whether the answer is read aloud."""
        heard = self.transcribe(clips) if transcripts is None else transcripts
        return cascade(heard, self._think, self._speak if aloud else None)

    def unguided(self, clips: Sequence[Clip], task: Task, seed: int) -> list[Done]:
        """What the model makes of a task for each clip, free to write what it likes."""
        prompts: list[list[Segment] | None] = [
            self.model.prompts.ask(task_recognition.asked(task, clip.id, clip.text, clip.units, seed))
            if clip.text and clip.units
            else None
            for clip in clips
        ]
        fitting, asked = self._asked(prompts)
        generated = self.model.unguided(asked, self.generation) if asked else []
        found = {
            place: task_recognition.done(ids, self.model.vocabulary, task.kind)
            for place, ids in zip(fitting, generated, strict=True)
        }
        return [found.get(place, Done("nothing", False)) for place in range(len(clips))]

    @torch.inference_mode()
    def text_losses(self, clips: Sequence[Clip], kind: Kind) -> list[UnitLoss]:
        """How well the model foretells the words of each clip's right answer, given its question in text."""
        losses: list[UnitLoss] = []
        for start in range(0, len(clips), _LOSS_ROWS):
            losses += self._text_losses(clips[start : start + _LOSS_ROWS], kind)
        return losses

    def _text_losses(self, clips: Sequence[Clip], kind: Kind) -> list[UnitLoss]:
        vocabulary, prompts = self.model.vocabulary, self.model.prompts
        rows, firsts = [], []
        for clip in clips:
            exchange = Exchange(kind, question=clip.text or "", answer=clip.answer or "")
            firsts.append(len(vocabulary.encode_prompt(prompts.ask(exchange))))
            rows.append(vocabulary.encode_prompt(_up_to_answer(prompts, exchange))[: self._context])
        longest = max(map(len, rows))
        ids = torch.tensor(
            [row + [vocabulary.pad] * (longest - len(row)) for row in rows], device=self.model.model.device
        )
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=ids.device)
        scores = self.model.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        control = torch.isin(ids, torch.tensor(sorted(vocabulary.control_ids), device=ids.device))
        answer = torch.arange(longest, device=ids.device)[None] >= torch.tensor(firsts, device=ids.device)[:, None]
        counted = (answer & ~control & mask.bool())[:, 1:]
        return [UnitLoss(float(n[c].sum()), int(c.sum())) for n, c in zip(nats, counted, strict=True)]

    def _think(self, questions: Sequence[str]) -> list[Answer]:
        return self._replies([Exchange("t2t", question=words) for words in questions], "t2t")

    def _speak(self, texts: Sequence[str]) -> list[Answer]:
        return self._prompted([self.model.prompts.speaking(text) for text in texts], "speak")

    def _replies(self, asked: Sequence[Exchange | None], kind: Kind) -> list[Answer]:
        return self._prompted([self.model.prompts.ask(each) if each else None for each in asked], kind)

    def _prompted(self, prompts: Sequence[list[Segment] | None], kind: Kind) -> list[Answer]:
        fitting, asked = self._asked(prompts)
        replies = dict(zip(fitting, self.model.reply(asked, kind, self.generation) if asked else (), strict=True))
        return [replies.get(place, NO_ROOM) for place in range(len(prompts))]

    def _asked(self, prompts: Sequence[list[Segment] | None]) -> tuple[list[int], list[list[Segment]]]:
        """(places of the prompts that can be asked, those prompts)."""
        fitting = {place: prompt for place, prompt in enumerate(prompts) if prompt and self._fits(prompt)}
        return list(fitting), list(fitting.values())


def _up_to_answer(prompts: PromptFormat, exchange: Exchange) -> list[Segment]:
    """A training row whose answer is text, without what its template puts after that."""
    row: list[Segment] = [Template(prompts.prefix), *prompts.filled(exchange)]
    while not isinstance(row[-1], Plain):
        row.pop()
    return row


def _question(kind: Kind, clip: Clip) -> Exchange | None:
    """None if the clip lacks what the kind asks with."""
    if kind in ("t2s", "t2t", "text"):
        return Exchange(kind, question=clip.text) if clip.text else None
    return Exchange(kind, question_units=clip.units) if clip.units else None
