"""What each route does, in terms of the pipeline; no HTTP here."""

import asyncio
import secrets
from dataclasses import dataclass

from serve.dialogue import understand
from serve.encoder import Heard, Refused
from serve.errors import ApiError
from serve.memory import Exchange, Recollection
from serve.pipeline import Pipeline
from serve.prompting import Ask, Dictate, Read, Reply, Sampling, Task, TooLong
from serve.vocoder import Line
from serve.wire import ChatRequest, SpeechRequest, TranscriptionRequest, Voice
from speechgpt.language.config import GenerationSection
from speechgpt.runtime.config import ServingSection

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
    """The bundle behind a model name. created: Unix seconds."""

    name: str
    digest: str
    created: int


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
    ) -> None:
        self.served = served
        self.serving = serving
        self._pipeline = pipeline
        self._memory = memory
        self._generation = generation

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        self.check_model(request.model)
        if request.audio:
            check_voice(request.audio.voice, "audio.voice")
        dialogue = await understand(request.messages, self, self.serving.max_text_characters)
        task = Ask(tuple(dialogue), "chain" if request.audio else "text", self._sampling(request))
        reply = await self._reply(task, "messages")
        if not request.audio or not reply.units:
            return ChatAnswer(reply, None)
        audio_id = f"audio_{secrets.token_hex(16)}"
        exchange = Exchange(question=dialogue[-1].text or reply.transcript or "", answer=reply.text or "")
        data, expires_at = await asyncio.gather(
            self._pipeline.speak(Line(reply.units), *encoding(request.audio.format)),
            self._memory.keep(audio_id, exchange),
        )
        return ChatAnswer(reply, SpokenAnswer(audio_id, data, expires_at))

    async def transcribe(self, clip: bytes, request: TranscriptionRequest) -> WrittenSpeech:
        self.check_model(request.model)
        if request.language not in (None, LANGUAGE):
            raise ApiError(
                400, f"language: this model hears {LANGUAGE!r} only", code="unsupported_value", param="language"
            )
        heard = await self.hear(clip, "file")
        generation = self._generation.model_copy(update={"temperature": request.temperature or 0.0})
        return WrittenSpeech(await self._reply(Dictate(heard.units, Sampling(generation)), "file"), heard.seconds)

    async def speak(self, request: SpeechRequest) -> SaidText:
        self.check_model(request.model)
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
        reply = await self._reply(Read(text, Sampling(self._generation)), "input")
        if not reply.units:
            raise ApiError(500, "The model found no way to say this text.", code="no_speech")
        return SaidText(
            reply, await self._pipeline.speak(Line(reply.units, request.speed), *encoding(request.response_format))
        )

    async def hear(self, clip: bytes, param: str) -> Heard:
        heard = await self._pipeline.hear(clip)
        if isinstance(heard, Refused):
            raise ApiError(400, f"{param}: {heard.reason}: {heard.detail}", code=f"audio_{heard.reason}", param=param)
        return heard

    async def write_down(self, heard: Heard, param: str) -> str:
        greedy = self._generation.model_copy(update={"temperature": 0.0})
        return (await self._reply(Dictate(heard.units, Sampling(greedy)), param)).text or ""

    async def recall(self, audio_id: str) -> Exchange | None:
        return await self._memory.recall(audio_id)

    async def _reply(self, task: Task, param: str) -> Reply:
        reply = await self._pipeline.reply(task)
        if isinstance(reply, TooLong):
            raise ApiError(
                400,
                f"{param}: {reply.tokens} tokens leave no room for an answer in the model's context of {reply.context}",
                code="context_length_exceeded",
                param=param,
            )
        return reply

    def check_model(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(
                404,
                f"The model {name!r} is not served here; {self.served.name!r} is.",
                code="model_not_found",
                param="model",
            )

    def _sampling(self, request: ChatRequest) -> Sampling:
        asked = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        limits = (request.max_completion_tokens, request.max_tokens, self._generation.max_new_tokens)
        changes = {name: value for name, value in asked.items() if value is not None}
        changes["max_new_tokens"] = min(limit for limit in limits if limit is not None)
        return Sampling(self._generation.model_copy(update=changes), request.seed)


def encoding(format: str) -> tuple[str, int]:
    """The file format and its rate: headerless pcm at OpenAI's rate, files with a header at the model's own."""
    return format, PCM_RATE if format in ("pcm", "pcm16") else NATIVE_RATE


def check_voice(voice: Voice, param: str) -> None:
    name = voice if isinstance(voice, str) else voice.id
    if name not in VOICES:
        raise ApiError(
            400, f"{param}: no voice {name!r}; this model has one, 'default'", code="voice_not_found", param=param
        )
