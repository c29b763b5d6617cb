"""What each route does, in terms of the pipeline; no HTTP here."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve import visits
from serve.dialogue import understand
from serve.encoder import Heard, Refused
from serve.errors import ApiError
from serve.memory import Exchange, Recollection
from serve.pacing import FEWEST
from serve.pipeline import Pipeline
from serve.prompting import Ask, Dictate, Read, Reply, Sampling, Task, TooLong, Words
from serve.vocoder import Line
from serve.voice import Manner, Sound
from serve.wire import AudioOptions, ChatRequest, SpeechRequest, TranscriptionRequest, Voice
from speechgpt.language.config import GenerationSection
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    from speechgpt.language.prompts import Turn

LANGUAGE = "en"
"""What the shipped models hear and say."""
PCM_RATE = 24_000
"""Hz that OpenAI's clients take headerless pcm to have."""
NATIVE_RATE = 16_000
VOICES = frozenset(
    [
        "default",
        "alloy",
        "ash",
        "ballad",
        "cedar",
        "coral",
        "echo",
        "fable",
        "marin",
        "nova",
        "onyx",
        "sage",
        "shimmer",
        "verse",
    ]
)
"""A bundle has one voice. OpenAI's own names all mean it, because its clients cannot leave the name out."""


@dataclass(frozen=True)
class Served:
    """The bundle behind a model name. created: Unix seconds. adapters: of its own, each a model name, too."""

    name: str
    digest: str
    created: int
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpokenAnswer:
    """data: a sound file in the format that was asked for. expires_at: Unix seconds."""

    id: str
    data: bytes
    expires_at: int


@dataclass(frozen=True)
class ChatAnswer:
    reply: Reply
    audio: SpokenAnswer | None


@dataclass(frozen=True)
class Kept:
    """The spoken answer is remembered now, until `expires_at` (Unix seconds)."""

    expires_at: int


LivePiece = Words | Sound | Kept | Reply


@dataclass(frozen=True)
class LiveAnswer:
    """audio_id: of a spoken one. pieces: what it comes as, the whole Reply last; closing them stops the work."""

    audio_id: str | None
    pieces: AsyncGenerator[LivePiece, None]


@dataclass(frozen=True)
class WrittenSpeech:
    """reply.text: the words. seconds: the clip's length."""

    reply: Reply
    seconds: float


@dataclass(frozen=True)
class SaidText:
    """data: a sound file in the format that was asked for."""

    reply: Reply
    data: bytes


class Service:
    def __init__(
        self,
        served: Served,
        pipeline: Pipeline,
        memory: Recollection,
        serving: ServingSection,
        generation: GenerationSection,
        adapter: str = "",
    ) -> None:
        """adapter: with which it answers, one of the bundle's named ones; "" is the bundle as it is."""
        self.served = served
        self._adapter = adapter
        self.serving = serving
        self._pipeline = pipeline
        self._memory = memory
        self._generation = generation

    @property
    def model(self) -> str:
        """What clients call it."""
        return self._adapter or self.served.name

    def answering_as(self, model: str) -> "Service":
        """The same, as a model that a client names: the bundle or an adapter. Raises ApiError, 404, for others."""
        if model == self.served.name:
            return self
        if model in self.served.adapters:
            return Service(self.served, self._pipeline, self._memory, self.serving, self._generation, model)
        here = " and ".join(repr(name) for name in (self.served.name, *self.served.adapters))
        raise ApiError(
            404,
            f"The model {model!r} is not served here; {here} {'are' if self.served.adapters else 'is'}.",
            code="model_not_found",
            param="model",
        )

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        if request.audio:
            check_voice(request.audio.voice, "audio.voice")
        dialogue = await self._understood(request)
        reply = await self._reply(Ask(tuple(dialogue), request.form, self._sampling(request)), "messages")
        if not request.audio or not reply.units:
            return ChatAnswer(reply, None)
        audio_id = _new_audio_id()
        data, expires_at = await asyncio.gather(
            self._pipeline.speak(Line(reply.units), request.audio.format, _rate(request.audio)),
            self._memory.keep(_of_key(audio_id), _exchange(dialogue, reply)),
        )
        return ChatAnswer(reply, SpokenAnswer(audio_id, data, expires_at))

    async def chat_live(self, request: ChatRequest) -> LiveAnswer:
        """The answer while it is made. Returns with its first piece: what can be refused is refused by then."""
        if request.audio:
            check_voice(request.audio.voice, "audio.voice")
        dialogue = await self._understood(request)
        task = Ask(tuple(dialogue), request.form, self._sampling(request))
        if not request.audio:
            return LiveAnswer(None, await self._task(self._pipeline.unfold(task), "messages"))
        audio_id = _new_audio_id()
        manner = Manner(request.audio.format, _rate(request.audio))
        pieces = await self._task(self._pipeline.voice(task, manner), "messages")
        return LiveAnswer(audio_id, self._remembered(pieces, audio_id, dialogue))

    async def answer_live(
        self, dialogue: "Sequence[Turn]", manner: Manner | None, most: int | None, *, forgetful: bool
    ) -> AsyncGenerator[LivePiece, None]:
        """One answer of a session, which counts as a request of its key; spoken in `manner`, or written. Returns with
        its first piece. most: tokens. Raises ApiError."""
        await visits.current().turn()
        tokens = self._generation.max_new_tokens
        generation = self._generation.model_copy(update={"max_new_tokens": min(most or tokens, tokens)})
        task = Ask(tuple(dialogue), "chain" if manner else "text", self._drawn(generation), forgetful)
        return await self._task(self._pipeline.voice(task, manner) if manner else self._pipeline.unfold(task), "input")

    async def say_live(self, text: str, manner: Manner) -> AsyncGenerator[LivePiece, None]:
        """Words of the service's own in a session, spoken; otherwise as `answer_live`."""
        await visits.current().turn()
        return await self._task(self._pipeline.voice(Read(text, self._drawn(self._generation)), manner), "input")

    async def _understood(self, request: ChatRequest) -> "list[Turn]":
        limits = (self.serving.max_text_characters, self.serving.max_request_seconds)
        return await understand(request.messages, self, *limits)

    async def _remembered(
        self, pieces: AsyncGenerator[LivePiece, None], audio_id: str, dialogue: "list[Turn]"
    ) -> AsyncGenerator[LivePiece, None]:
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Reply):
                    yield Kept(await self._memory.keep(_of_key(audio_id), _exchange(dialogue, piece)))
                yield piece

    async def _begun(self, pieces: AsyncGenerator[Any, None], param: str) -> AsyncGenerator[Any, None]:
        """The same pieces, once the first is there. Raises ApiError for a task that is too long."""
        try:
            first = await anext(pieces)
            if isinstance(first, TooLong):
                raise _too_long(first, param)
        except BaseException:
            await pieces.aclose()
            raise
        return _chained(first, pieces)

    async def _task(self, pieces: AsyncGenerator[Any, None], param: str) -> AsyncGenerator[Any, None]:
        """`_begun`, its tokens counted."""
        return _counted(await self._begun(pieces, param))

    async def transcribe(self, clip: bytes, request: TranscriptionRequest) -> WrittenSpeech:
        task, seconds = await self._dictation(clip, request)
        return WrittenSpeech(await self._reply(task, "file"), seconds)

    async def transcribe_live(self, clip: bytes, request: TranscriptionRequest) -> AsyncGenerator[LivePiece, None]:
        """The words as they are understood. Returns with the first of them."""
        task, _ = await self._dictation(clip, request)
        return await self._task(self._pipeline.unfold(task), "file")

    async def _dictation(self, clip: bytes, request: TranscriptionRequest) -> tuple[Dictate, float]:
        """What is to be written down, and its seconds."""
        if request.language not in (None, LANGUAGE):
            raise ApiError(
                400, f"language: this model hears {LANGUAGE!r} only", code="unsupported_value", param="language"
            )
        heard = await self.hear(clip, "file")
        return self._dictate(heard, request.temperature or 0.0), heard.seconds

    async def speak(self, request: SpeechRequest) -> SaidText:
        reply = await self._reply(self._reading(request), "input")
        if not reply.units:
            raise _wordless()
        line = Line(reply.units, request.speed)
        return SaidText(reply, await self._pipeline.speak(line, request.response_format, _rate(request)))

    async def speak_live(self, request: SpeechRequest) -> AsyncGenerator[Sound | Reply, None]:
        """The sound while it is made, and the reply that it was last. Returns when the first sound is there."""
        manner = Manner(request.response_format, _rate(request), request.speed)
        pieces = await self._task(self._pipeline.voice(self._reading(request), manner), "input")
        return await self._begun(_audible(pieces), "input")

    def _reading(self, request: SpeechRequest) -> Read:
        check_voice(request.voice, "voice")
        if len(request.input) > self.serving.max_text_characters:
            raise ApiError(
                400,
                f"input: {len(request.input)} characters; at most {self.serving.max_text_characters} are taken",
                code="string_above_max_length",
                param="input",
            )
        text = request.input.strip()
        if not text:
            raise ApiError(400, "input: nothing to say", code="empty_content", param="input")
        return Read(text, self._drawn(self._generation))

    async def hear(self, clip: bytes, param: str) -> Heard:
        heard = await self._pipeline.hear(clip)
        if isinstance(heard, Refused):
            raise ApiError(400, f"{param}: {heard.reason}: {heard.detail}", code=f"audio_{heard.reason}", param=param)
        visits.current().heard(heard.seconds)
        return heard

    async def write_down(self, heard: Heard, param: str) -> str:
        """The words of what was heard."""
        return (await self._reply(self._dictate(heard, 0.0), param)).text or ""

    def _dictate(self, heard: Heard, temperature: float) -> Dictate:
        # The words of an answer have a limit of their own, so that there is room for its units; here all is words.
        tokens = self._generation.max_new_tokens
        changes = {"temperature": temperature, "max_text_tokens": tokens}
        return Dictate(heard.units, self._drawn(self._generation.model_copy(update=changes)))

    async def recall(self, audio_id: str) -> Exchange | None:
        return await self._memory.recall(_of_key(audio_id))

    async def _reply(self, task: Task, param: str) -> Reply:
        reply = await self._pipeline.reply(task)
        if isinstance(reply, TooLong):
            raise _too_long(reply, param)
        visits.current().spent(reply.total_tokens)
        return reply

    def _sampling(self, request: ChatRequest) -> Sampling:
        asked = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        limits = (request.max_completion_tokens, request.max_tokens, self._generation.max_new_tokens)
        changes = {name: value for name, value in asked.items() if value is not None}
        changes["max_new_tokens"] = min(limit for limit in limits if limit is not None)
        return self._drawn(self._generation.model_copy(update=changes), request.seed)

    def _drawn(self, generation: GenerationSection, seed: int | None = None) -> Sampling:
        return Sampling(generation, seed, self._adapter)


def _rate(request: AudioOptions | SpeechRequest) -> int:
    """Hz: unless asked otherwise, headerless pcm at OpenAI's rate, files with a header at the model's own."""
    format = request.format if isinstance(request, AudioOptions) else request.response_format
    return request.sample_rate or (PCM_RATE if format in ("pcm", "pcm16") else NATIVE_RATE)


def _new_audio_id() -> str:
    return f"audio_{secrets.token_hex(16)}"


def _of_key(audio_id: str) -> str:
    """Under what it is remembered: nobody else's key finds it."""
    return f"{visits.current().key or ''}/{audio_id}"


def _exchange(dialogue: "list[Turn]", reply: Reply) -> Exchange:
    return Exchange(question=dialogue[-1].text or reply.transcript or "", answer=reply.text or "")


def _too_long(found: TooLong, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param}: {found.tokens} tokens leave no room for an answer in the model's context of {found.context}",
        code="context_length_exceeded",
        param=param,
    )


def _wordless() -> ApiError:
    return ApiError(500, "The model found no way to say this text.", code="no_speech")


async def _audible(pieces: AsyncGenerator[LivePiece, None]) -> AsyncGenerator[Sound | Reply, None]:
    """Sound and reply alone. Raises ApiError for a reply without speech."""
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Reply) and not piece.units:
                raise _wordless()
            if isinstance(piece, Sound | Reply):
                yield piece


async def _counted(pieces: AsyncGenerator[LivePiece, None]) -> AsyncGenerator[LivePiece, None]:
    """The same pieces. Their tokens are told to the visit; of an answer that is given up midway, as far as they can be
    told from outside: at least so many were made."""
    visit = visits.current()
    made = 0
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                match piece:
                    case Reply():
                        visit.spent(piece.total_tokens)
                        made = 0
                    case Words():
                        made += 1
                    case Sound():
                        made += FEWEST
                yield piece
        finally:
            if made:
                visit.spent(made)


async def _chained(first: Any, rest: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


def check_voice(voice: Voice, param: str) -> None:
    name = voice if isinstance(voice, str) else voice.id
    if name not in VOICES:
        raise ApiError(
            400, f"{param}: no voice {name!r}; this model has one, 'default'", code="voice_not_found", param=param
        )
