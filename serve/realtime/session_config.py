"""What a session is set to, as pydantic models: refuses what it does not know, and by name what this model cannot."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from serve.errors import ApiError, from_validation
from serve.service import LANGUAGE, check_voice
from serve.wire import Request, Voice

M = TypeVar("M", bound=BaseModel)

MAX_OUTPUT_TOKENS = 4096
_WHOLE = ("format", "turn_detection")
"""Parts that are of one kind or another: what is set for one kind means nothing to the next."""


class Pcm(BaseModel):
    """16-bit little-endian mono."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["audio/pcm"]
    rate: Literal[24000] = 24000


class MuLaw(BaseModel):
    """G.711 at 8 kHz."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["audio/pcmu"]


class ALaw(BaseModel):
    """G.711 at 8 kHz."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["audio/pcma"]


AudioFormat = Annotated[Pcm | MuLaw | ALaw, Field(discriminator="type")]


class ServerVad(BaseModel):
    """See `turn_detection.VoiceActivity`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["server_vad"]
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(300, ge=0, le=5000)
    silence_duration_ms: int = Field(500, ge=20, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = Field(None, ge=1000, le=60_000)


class Transcription(Request):
    """Whatever model is named, the session's own writes down what it hears."""

    neutral = {"prompt": ("",), "keywords": ([],), "languages": ([], [LANGUAGE]), "delay": ()}

    model: str | None = None
    language: str | None = None

    @field_validator("language")
    @classmethod
    def _is_heard(cls, language: str | None) -> str | None:
        if language not in (None, LANGUAGE):
            raise PydanticCustomError("unsupported_value", f"this model hears '{LANGUAGE}' only")
        return language


def _by_level(turn_detection: Any) -> Any:
    if isinstance(turn_detection, dict) and turn_detection.get("type") == "semantic_vad":
        raise PydanticCustomError("unsupported_value", "semantic_vad is not supported by this model; server_vad is")
    return turn_detection


class AudioInput(Request):
    neutral = {"noise_reduction": ()}

    format: AudioFormat = Pcm(type="audio/pcm")
    transcription: Transcription | None = None
    turn_detection: Annotated[ServerVad | None, BeforeValidator(_by_level)] = ServerVad(type="server_vad")


class AudioOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: AudioFormat = Pcm(type="audio/pcm")
    voice: Voice = "default"
    speed: float = Field(1.0, ge=0.25, le=1.5)


class Audio(BaseModel):
    model_config = ConfigDict(extra="forbid")
    input: AudioInput = Field(default_factory=AudioInput)
    output: AudioOutput = Field(default_factory=AudioOutput)


Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
MaxOutputTokens = Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)] | Literal["inf"]


class SessionConfig(Request):
    """`session` of the API. instructions: kept and told, not followed; the model's own are part of its weights."""

    neutral = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "prompt": (),
        "reasoning": (),
        "include": ([],),
        "tracing": (),
        # Told by the server.
        "id": ("*",),
        "object": ("realtime.session",),
        "expires_at": ("*",),
    }

    type: Literal["realtime"] = "realtime"
    model: str = ""
    instructions: str = ""
    output_modalities: Modalities = ["audio"]
    audio: Audio = Field(default_factory=Audio)
    max_output_tokens: MaxOutputTokens = "inf"
    truncation: Literal["auto", "disabled"] = "auto"

    def updated(self, changes: dict[str, Any], max_characters: int) -> "SessionConfig":
        """With what `changes` names changed, the rest as it is. Raises ApiError naming the parameter."""
        new = read(SessionConfig, merged(self.model_dump(), changes), "session")
        if self.model and new.model != self.model:
            raise ApiError(400, "session.model: cannot be changed", code="invalid_value", param="session.model")
        if len(new.instructions) > max_characters:
            raise ApiError(
                400,
                f"session.instructions: {len(new.instructions)} characters; at most {max_characters} are taken",
                code="string_above_max_length",
                param="session.instructions",
            )
        check_voice(new.audio.output.voice, "session.audio.output.voice")
        return new

    def told(self) -> dict[str, Any]:
        """As `session` of a server event."""
        fixed: dict[str, Any] = {"tools": [], "tool_choice": "auto", "tracing": None, "prompt": None, "include": None}
        body = self.model_dump()
        body["audio"]["input"]["noise_reduction"] = None
        return {"object": "realtime.session", **body, **fixed}


def merged(old: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `old`, objects key by key. A null says nothing, except of a part that can be off."""
    result = dict(old)
    for name, value in changes.items():
        before = old.get(name)
        if value is None and name not in ("turn_detection", "transcription"):
            continue
        if not isinstance(value, dict) or not isinstance(before, dict):
            result[name] = value
            continue
        another = name in _WHOLE and value.get("type", before["type"]) != before["type"]
        result[name] = value if another else merged(before, value)
    return result


def read(model: type[M], body: Any, within: str) -> M:
    """Raises ApiError naming the parameter, as a path below `within`."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise from_validation(error, within) from None
