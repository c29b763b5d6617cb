"""The part of the OpenAI API that is spoken here, as pydantic models: requests refuse what they do not know."""

from typing import Annotated, Any, ClassVar, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from speechgpt.language.config import ReplyForm

ChatAudioFormat = Literal["wav", "mp3", "flac", "opus", "aac", "pcm16"]
SpeechFormat = Literal["wav", "mp3", "flac", "opus", "aac", "pcm"]
TranscriptFormat = Literal["json", "text", "verbose_json", "srt", "vtt"]
SampleRate = Literal[16000, 24000]
MOST_MESSAGES = 1000
"""Of one request: each is work before the first is answered."""
MEDIA_TYPES = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "pcm": "audio/pcm",
}


class Request(BaseModel):
    """A request body. `neutral`: parameters of OpenAI's that this service has no use for, and the values that ask
    nothing of them (`*`: any); other values are refused rather than ignored."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name not in cls.neutral:
                kept[name] = value
            elif value is not None and cls.neutral[name] != ("*",) and value not in cls.neutral[name]:
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "is not supported by this model",
                    {"param": name, "code": "unsupported_parameter"},
                )
        return kept


def _plain_voice(voice: Any) -> Any:
    """OpenAI's clients name a voice by a string or by {"id": …}."""
    return voice["id"] if isinstance(voice, dict) and set(voice) == {"id"} else voice


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Voice = Annotated[str, BeforeValidator(_plain_voice, json_schema_input_type=str | dict[Literal["id"], str])]


class InputAudio(BaseModel):
    model_config = ConfigDict(extra="forbid")
    data: str
    """Base64 of a whole sound file."""
    format: Literal["wav", "mp3", "flac", "opus", "ogg", "m4a", "webm"]
    """Informative: the file's own header decides."""


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class AudioPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["input_audio"]
    input_audio: InputAudio


Parts = Annotated[
    list[Annotated[TextPart | AudioPart, Field(discriminator="type")]],
    BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart | AudioPart]),
]


Texts = Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]


class InstructionMessage(BaseModel):
    """Taken, because clients send them by habit, and not followed: the model's own instruction is part of its weights.
    A reply says so in `speechgpt.not_followed`."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None
    is_said: ClassVar[bool] = False


class UserMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: Parts
    name: str | None = None
    is_said: ClassVar[bool] = True


class AudioReference(BaseModel):
    """An earlier spoken answer, by the id that its reply carried."""

    model_config = ConfigDict(extra="ignore")
    id: str


class AssistantMessage(BaseModel):
    """An earlier answer. Clients send whole reply messages back, so fields beyond these are let by."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["assistant"]
    content: Texts | None = None
    audio: AudioReference | None = None
    is_said: ClassVar[bool] = True


Message = Annotated[InstructionMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class AudioOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    voice: Voice
    format: ChatAudioFormat
    sample_rate: SampleRate | None = None
    """Hz; not OpenAI's. Left out: 24000 in headerless pcm, as OpenAI's clients expect, else the vocoder's own 16000."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(Request):
    neutral = {
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "stop": ([],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        # These only label a request at OpenAI; nothing here would act on them.
        "metadata": ("*",),
        "user": ("*",),
        "safety_identifier": ("*",),
        "prompt_cache_key": ("*",),
        "prompt_cache_options": ("*",),
        "prompt_cache_retention": ("*",),
    }

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    modalities: list[Literal["text", "audio"]] | None = Field(None, min_length=1)
    """Left out: text alone."""
    audio: AudioOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    """Not OpenAI's; common among open servers (`extra_body` of the official client)."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    reply_form: Literal["chain", "direct", "text"] | None = None
    """Not OpenAI's. How the model comes to its answer: by way of the transcript of a spoken question (`chain`, what a
    spoken answer is otherwise), without it (`direct`: the first sound comes sooner), or in text alone."""

    @property
    def form(self) -> ReplyForm:
        return self.reply_form or ("chain" if self.wants_audio else "text")

    @property
    def wants_audio(self) -> bool:
        return "audio" in (self.modalities or [])

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.wants_audio and "text" not in (self.modalities or []):
            raise _wrong("modalities", 'take ["text"] or ["text", "audio"]: a spoken answer comes with its text')
        if self.wants_audio and self.audio is None:
            raise _wrong("audio", "is required when modalities has audio", "missing_required_parameter")
        if self.audio and not self.wants_audio:
            raise _wrong("audio", "is only allowed when modalities has audio")
        if self.audio and self.stream and self.audio.format != "pcm16":
            raise _wrong("audio.format", "streamed audio is pcm16 only", "unsupported_value")
        if self.reply_form and self.wants_audio != (self.reply_form != "text"):
            raise _wrong("reply_form", "chain and direct are forms of a spoken answer, text is that of a written one")
        if self.stream_options and not self.stream:
            raise _wrong("stream_options", "is only allowed when stream is true")
        if [message.role for message in self.messages if message.is_said][-1:] != ["user"]:
            raise _wrong("messages", "must end with a user message")
        return self


class SpeechRequest(Request):
    # How to speak: a bundle has one way.
    neutral = {"instructions": ("*",)}

    model: str
    input: str = Field(min_length=1)
    voice: Voice
    response_format: SpeechFormat = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = "audio"
    """Either way pcm, mp3, opus and aac are sent while they are made. A wav or flac comes when it is whole: its header
    says how long it is."""
    sample_rate: SampleRate | None = None
    """As in AudioOptions."""


class TranscriptionRequest(Request):
    """A multipart form; lists come as repeated fields with `[]` in their name."""

    neutral = {
        # A hint of what is spoken of, at best: no words are sure to be found because of it.
        "prompt": ("*",),
        "chunking_strategy": ("auto",),
        "include[]": (),
        "timestamp_granularities[]": (),
        "keywords[]": (),
        "known_speaker_names[]": (),
        "known_speaker_references[]": (),
        "languages[]": (),
        "timestamp_granularities": (),
        "include": (),
    }

    file: UploadFile
    model: str
    language: str | None = None
    response_format: TranscriptFormat = "json"
    temperature: float | None = Field(None, ge=0, le=1)
    stream: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> "TranscriptionRequest":
        if self.stream and self.response_format not in ("json", "text"):
            raise _wrong("stream", "streams json or text only", "unsupported_value")
        return self


def _wrong(param: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    return PydanticCustomError("wrong_value", message, {"param": param, "code": code})


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What every refusal and failure says."""

    error: ErrorDetail


class PromptTokens(BaseModel):
    text_tokens: int
    audio_tokens: int
    cached_tokens: int = 0


class CompletionTokens(BaseModel):
    text_tokens: int
    audio_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class ReplyAudio(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    audio: ReplyAudio | None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Reading(BaseModel):
    """What the model made of the request beyond OpenAI's fields."""

    question_transcript: str | None
    """What it understood the user to say, where the question was spoken."""
    well_formed: bool
    """Whether the answer kept the template that it was trained on."""
    not_followed: list[str] = []
    """Messages with instructions, which were taken and have no effect: `messages.0`."""


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    speechgpt: Reading


class InputTokenDetails(BaseModel):
    audio_tokens: int
    text_tokens: int


class TranscriptUsage(BaseModel):
    type: Literal["tokens"] = "tokens"
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: InputTokenDetails


class Transcript(BaseModel):
    text: str
    usage: TranscriptUsage


class DurationUsage(BaseModel):
    type: Literal["duration"] = "duration"
    seconds: float


class VerboseTranscript(BaseModel):
    """Without segments and words: the model gives no times inside a clip."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    text: str
    usage: DurationUsage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "speechgpt"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
