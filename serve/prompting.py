"""What a service asks of the language model, and what comes back; plain Python, to run inside and outside Serve."""

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from serve.engine import Engine, LocalEngine, Request
from serve.pacing import FEWEST, Pacing
from speechgpt.language.config import GenerationSection, ReplyForm
from speechgpt.language.sentences import sayable
from speechgpt.runtime import bundle as bundles
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    from speechgpt.language.console import Part
    from speechgpt.language.model import SpeechLanguageModel
    from speechgpt.language.prompts import Kind, Turn
    from speechgpt.language.segments import Segment
    from speechgpt.language.unfolding import Unfolding
    from speechgpt.language.wording import Wording


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens drawn. seed: None where the client left it open. adapter: see `Request`."""

    generation: GenerationSection
    seed: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Ask:
    """A dialogue whose last turn is to be answered; earlier turns have their text.

    forgetful: where it leaves too little room for an answer, its oldest exchanges are left out.
    """

    dialogue: "tuple[Turn, ...]"
    form: ReplyForm
    sampling: Sampling
    forgetful: bool = False


@dataclass(frozen=True)
class Dictate:
    """Units to be written down."""

    units: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Read:
    """Text to be said, as units; each of its sentences as if it were alone (see `sentences.sayable`)."""

    text: str
    sampling: Sampling


@dataclass(frozen=True)
class Typed:
    """A line of the published console (see `speechgpt.language.console`)."""

    parts: "tuple[Part, ...]"
    sampling: Sampling


Task = Ask | Dictate | Read | Typed


@dataclass(frozen=True)
class Prompt:
    """A task that fits the model. The counts are tokens; units are tokens, too. forgotten: exchanges left out."""

    ids: tuple[int, ...]
    kind: "Kind"
    sampling: Sampling
    text_tokens: int
    audio_tokens: int
    forgotten: int = 0


@dataclass(frozen=True)
class TooLong:
    """A task that leaves no room for an answer: its tokens, and the model's context.

    A value, not an exception: it is the client's fault and no failure of the replica.
    """

    tokens: int
    context: int


@dataclass(frozen=True)
class Reply:
    """An answer (see `speechgpt.language.answers.Answer`), and what it cost in tokens. forgotten: exchanges of the
    dialogue for which there was no room."""

    transcript: str | None
    text: str | None
    units: list[int]
    well_formed: bool
    finish: Literal["stop", "length"]
    prompt_text_tokens: int
    prompt_audio_tokens: int
    text_tokens: int
    audio_tokens: int
    forgotten: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_text_tokens + self.prompt_audio_tokens + self.text_tokens + self.audio_tokens


@dataclass(frozen=True)
class Words:
    """More of what the model understood (`transcript`) or answers (`text`)."""

    field: Literal["transcript", "text"]
    text: str


@dataclass(frozen=True)
class Units:
    """More of the spoken answer: as many units as are worth a pass of the vocoder."""

    units: list[int]


Unfolded = Words | Units | Reply | TooLong
"""What a reply unfolds into, the whole Reply last; or a TooLong alone."""


class Prompter:
    """A bundle's language model, as tasks and replies. seconds: after so long a reply is given up."""

    def __init__(self, wording: "Wording", engine: Engine, seconds: float) -> None:
        self._wording = wording
        self._engine = engine
        self._seconds = seconds

    @classmethod
    def load(cls, bundle: Path, serving: ServingSection) -> "Prompter":
        """`serving.language.batch` replies are generated at a time, by `serving.language.engine`."""
        language = bundle / "language"
        adapter = bundle / "adapter" if (bundle / "adapter").is_dir() else None
        if serving.language.engine == "vllm":
            from serve.vllm_engine import VllmEngine
            from speechgpt.language.wording import Wording

            wording = Wording.load(language)
            engine = VllmEngine.load(language, adapter, wording, serving, bundles.adapters(bundle))
            return cls(wording, engine, serving.request_timeout_seconds)
        from speechgpt.language.model import SpeechLanguageModel

        model = SpeechLanguageModel.load(language, adapter, precision=serving.language.precision)
        return cls.of(model, serving, bundles.adapters(bundle))

    @classmethod
    def of(
        cls, model: "SpeechLanguageModel", serving: ServingSection, adapters: Mapping[str, Path] | None = None
    ) -> "Prompter":
        from speechgpt.language.batching import ContinuousBatch

        wording, seconds = model.wording, serving.request_timeout_seconds
        batch = ContinuousBatch(model, serving.language.batch, adapters, quick=True)
        return cls(wording, LocalEngine(batch, seconds), seconds)

    @property
    def unit_count(self) -> int:
        return self._wording.vocabulary.unit_count

    @property
    def ongoing(self) -> int:
        """Replies that are generated or wait for it."""
        return self._engine.ongoing

    def check(self) -> None:
        """Raises RuntimeError when the engine hangs."""
        self._engine.check()

    async def reply(self, task: Task) -> Reply | TooLong:
        async with aclosing(self.unfold(task)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Reply | TooLong):
                    return piece
        raise RuntimeError("a reply ended without being whole")

    async def unfold(self, task: Task, first: int = FEWEST) -> AsyncGenerator[Unfolded, None]:
        """The reply as it is generated. Closing this stops the generation. first: units that come together first."""
        prompts: list[Prompt] = []
        for part in _parts(task):
            prompt = self.prompt(part)
            if isinstance(prompt, TooLong):
                yield prompt
                return
            prompts.append(prompt)
        pacing, replies = Pacing(first), []
        for prompt in prompts:
            async with aclosing(self._unfold(prompt, pacing)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Reply):
                        replies.append(piece)
                    else:
                        yield piece
        for units in pacing.finish():
            yield Units(units)
        yield _joined(replies)

    async def _unfold(self, prompt: Prompt, pacing: Pacing) -> AsyncGenerator[Words | Units | Reply, None]:
        """The units that `pacing` keeps back are not told."""
        from speechgpt.language.unfolding import Unfolding

        seed = secrets.randbits(31) if prompt.sampling.seed is None else prompt.sampling.seed
        drawn = prompt.sampling
        request = Request(prompt.ids, prompt.kind, drawn.generation, seed, self._seconds, drawn.adapter)
        unfolding = Unfolding(self._wording.vocabulary, prompt.kind)
        async with aclosing(self._engine.tokens(request)) as tokens:
            async for few in tokens:
                for piece in _pieces(unfolding, pacing, few):
                    yield piece
        rest, answer = unfolding.finish()
        for words in rest:
            yield Words(words.field, words.text)
        count = self._wording.vocabulary.encode_plain
        yield Reply(
            answer.transcript,
            answer.text,
            answer.units or [],
            answer.well_formed,
            answer.finish,
            prompt.text_tokens,
            prompt.audio_tokens,
            text_tokens=len(count(answer.transcript or "")) + len(count(answer.text or "")),
            audio_tokens=len(answer.units or []),
            forgotten=prompt.forgotten,
        )

    def prompt(self, task: Task) -> Prompt | TooLong:
        prompt = self._prompt(task)
        if not isinstance(task, Ask) or not task.forgetful:
            return prompt
        # Half of a context that is smaller than what may be answered is still a conversation.
        room = min(task.sampling.generation.max_new_tokens, self._wording.context // 2)
        dialogue = task.dialogue
        while len(dialogue) > 2 and (isinstance(prompt, TooLong) or len(prompt.ids) + room > self._wording.context):
            dialogue = dialogue[2:]
            prompt = self._prompt(replace(task, dialogue=dialogue))
        if isinstance(prompt, TooLong):
            return prompt
        return replace(prompt, forgotten=(len(task.dialogue) - len(dialogue)) // 2)

    def _prompt(self, task: Task) -> Prompt | TooLong:
        from speechgpt.language import console
        from speechgpt.language.prompts import kind_of

        prompts = self._wording.prompts
        segments: list[Segment]
        kind: Kind
        match task:
            case Ask(dialogue, form, sampling, _):
                segments, kind = prompts.dialogue(dialogue, form), kind_of(dialogue[-1], form)
            case Dictate(units, sampling):
                segments, kind = prompts.transcription(units), "transcribe"
            case Read(text, sampling):
                segments, kind = prompts.speaking(text), "speak"
            case Typed(parts, sampling) if self._wording.vocabulary.markers == "released":
                segments, kind = console.published_prompt(prompts.prefix, parts), console.task(parts)
            case Typed(parts, sampling):
                segments, kind = console.taught_prompt(prompts, parts)
        ids = self._wording.vocabulary.encode_prompt(segments)
        if len(ids) >= self._wording.context:
            return TooLong(len(ids), self._wording.context)
        heard = len(self._wording.vocabulary.units(ids))
        return Prompt(tuple(ids), kind, sampling, len(ids) - heard, heard)


def _parts(task: Task) -> list[Task]:
    if not isinstance(task, Read):
        return [task]
    return [replace(task, text=text) for text in sayable(task.text)]


def _joined(replies: list[Reply]) -> Reply:
    """Of the parts of one task."""
    if len(replies) == 1:
        return replies[0]
    return Reply(
        transcript=None,
        text=None,
        units=[unit for reply in replies for unit in reply.units],
        well_formed=all(reply.well_formed for reply in replies),
        finish="length" if any(reply.finish == "length" for reply in replies) else "stop",
        prompt_text_tokens=sum(reply.prompt_text_tokens for reply in replies),
        prompt_audio_tokens=sum(reply.prompt_audio_tokens for reply in replies),
        text_tokens=sum(reply.text_tokens for reply in replies),
        audio_tokens=sum(reply.audio_tokens for reply in replies),
    )


def _pieces(unfolding: "Unfolding", pacing: Pacing, tokens: list[int]) -> list[Words | Units]:
    from speechgpt.language import unfolding as unfolded

    pieces: list[Words | Units] = []
    for piece in unfolding.push(tokens):
        if isinstance(piece, unfolded.Words):
            pieces.append(Words(piece.field, piece.text))
        else:
            pieces += map(Units, pacing.push(piece.units))
    return pieces
