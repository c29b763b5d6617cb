"""What a client of a session may send, as pydantic models: unknown and malformed events become errors naming them."""

import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.errors import ApiError
from serve.realtime.session_config import AudioFormat, MaxOutputTokens, Modalities, read
from serve.wire import Request, Voice

MAX_ID = 64


class ClientEvent(BaseModel):
    """event_id: the client's own, told back in errors."""

    model_config = ConfigDict(extra="forbid")
    event_id: str | None = Field(None, max_length=512)


class SessionUpdate(ClientEvent):
    type: Literal["session.update"]
    session: dict[str, Any]


class AppendAudio(ClientEvent):
    type: Literal["input_audio_buffer.append"]
    audio: str
    """Base64, in the session's input format."""


class CommitAudio(ClientEvent):
    type: Literal["input_audio_buffer.commit"]


class ClearAudio(ClientEvent):
    type: Literal["input_audio_buffer.clear"]


class Content(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["input_text", "input_audio", "output_text", "output_audio", "text", "audio"]
    text: str | None = None
    audio: str | None = None
    transcript: str | None = None


_CONTENT = {
    "user": ("input_text", "input_audio"),
    "system": ("input_text",),
    "assistant": ("output_text", "output_audio", "text", "audio"),
}


class Message(BaseModel):
    """An item of the conversation; also a reference to one, in the input of a response."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["message", "item_reference"]
    id: str | None = Field(None, min_length=1, max_length=MAX_ID)
    role: Literal["user", "assistant", "system"] | None = None
    content: list[Content] = Field(default_factory=list, max_length=16)
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    """Has no effect, as at OpenAI."""

    @model_validator(mode="before")
    @classmethod
    def _is_message(cls, body: Any) -> Any:
        kind = body.get("type") if isinstance(body, dict) else None
        if isinstance(kind, str) and kind.startswith(("function_call", "mcp_")):
            raise _wrong("type", f"'{kind}' is not supported: this model calls no tools", "unsupported_value")
        return body

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.type == "item_reference":
            if self.id is None:
                raise _wrong("id", "is required of a reference", "missing_required_parameter")
            return self
        if self.role is None:
            raise _wrong("role", "is required", "missing_required_parameter")
        if not self.content:
            raise _wrong("content", "is empty", "empty_content")
        for place, part in enumerate(self.content):
            if part.type not in _CONTENT[self.role]:
                allowed = " and ".join(_CONTENT[self.role][:2])
                raise _wrong(f"content.{place}.type", f"a message of {self.role} has {allowed}", "invalid_value")
            needed = "audio" if part.type == "input_audio" else "transcript" if "audio" in part.type else "text"
            if getattr(part, needed) is None:
                raise _wrong(f"content.{place}.{needed}", "is required", "missing_required_parameter")
        return self


def _wrong(param: str, message: str, code: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{words}", {"words": message, "param": param, "code": code})


class CreateItem(ClientEvent):
    type: Literal["conversation.item.create"]
    item: Message
    previous_item_id: str | None = None
    """Where it goes: after this item; at the end without, at the front for `root`."""


class DeleteItem(ClientEvent):
    type: Literal["conversation.item.delete"]
    item_id: str


class RetrieveItem(ClientEvent):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class TruncateItem(ClientEvent):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: int = Field(ge=0)
    audio_end_ms: int = Field(ge=0)


class ResponseOutput(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: AudioFormat | None = None
    voice: Voice | None = None


class ResponseAudio(BaseModel):
    model_config = ConfigDict(extra="forbid")
    output: ResponseOutput | None = None


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ResponseParams(Request):
    """What one response has other than the session. instructions: as of the session."""

    neutral: ClassVar = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "prompt": (),
        "reasoning": (),
    }

    output_modalities: Modalities | None = None
    max_output_tokens: MaxOutputTokens | None = None
    audio: ResponseAudio | None = None
    instructions: str | None = None
    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[Message], Field(max_length=64)] | None = None
    metadata: Metadata | None = None


class CreateResponse(ClientEvent):
    type: Literal["response.create"]
    response: ResponseParams | None = None


class CancelResponse(ClientEvent):
    type: Literal["response.cancel"]
    response_id: str | None = None


Event = (
    SessionUpdate
    | AppendAudio
    | CommitAudio
    | ClearAudio
    | CreateItem
    | DeleteItem
    | RetrieveItem
    | TruncateItem
    | CreateResponse
    | CancelResponse
)
_EVENTS: dict[str, type[ClientEvent]] = {
    event.model_fields["type"].annotation.__args__[0]: event for event in get_args(Event)
}


class Malformed(Exception):
    """A message that is no event. event_id: the client's, as far as it can be read."""

    def __init__(self, error: ApiError, event_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.event_id = event_id


def parse(message: str | bytes) -> Event:
    """One message of the client's. Raises Malformed."""
    try:
        body = json.loads(message)
    except (ValueError, RecursionError):
        raise Malformed(ApiError(400, "The message is not valid JSON.", code="invalid_json"), None) from None
    if not isinstance(body, dict):
        raise Malformed(ApiError(400, "The message is not a JSON object.", code="invalid_json"), None)
    event_id = body.get("event_id")
    known = event_id[:512] if isinstance(event_id, str) else None
    kind = body.get("type")
    model = _EVENTS.get(kind) if isinstance(kind, str) else None
    if kind == "output_audio_buffer.clear":
        problem = "output_audio_buffer.clear: a WebSocket client holds its own output buffer"
        raise Malformed(ApiError(400, problem, code="unsupported_value", param="type"), known)
    if model is None:
        named = repr(kind[:64]) if isinstance(kind, str) else "nothing"
        problem = f"type: {named} is not an event of this API; {', '.join(_EVENTS)} are"
        raise Malformed(ApiError(400, problem, code="invalid_value", param="type"), known)
    try:
        return read(model, body, "")  # type: ignore[return-value]
    except ApiError as error:
        raise Malformed(error, known) from None
