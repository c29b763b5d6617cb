"""One response as the events that tell of it, in the order in which OpenAI's server sends them."""

import base64
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serve.errors import ApiError
from serve.prompting import Reply
from serve.realtime.conversation import Item, Part
from serve.realtime.session_config import AudioFormat, MaxOutputTokens
from serve.realtime.sound import seconds_of

Event = dict[str, Any]
Modality = Literal["text", "audio"]
Reason = Literal["turn_detected", "client_cancelled"]
_DELTA_SECONDS = 0.2
"""Sound in one event, at most."""


def new_id(kind: Literal["event", "sess", "conv", "item", "resp"]) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


@dataclass(frozen=True)
class Form:
    """How a response is given. conversation: id of the one it is added to, or None."""

    modality: Modality
    format: AudioFormat
    voice: str
    max_output_tokens: MaxOutputTokens
    conversation: str | None
    metadata: dict[str, str] | None = None


class Response:
    """The item that it makes is `item`; it is None until there is something of it.

    previous: id of the item before it, asked for when there is an item. Every method gives the events that follow from
    what it is told.
    """

    def __init__(self, form: Form, previous: Callable[[], str | None]) -> None:
        self.id = new_id("resp")
        self.form = form
        self.item: Item | None = None
        self.status: Literal["in_progress", "completed", "cancelled", "failed", "incomplete"] = "in_progress"
        self._last = previous
        self._previous: str | None = None
        self._details: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Length of its sound so far."""
        return self.item.parts[0].seconds if self.item and self.item.parts else 0.0

    def begin(self) -> list[Event]:
        return [{"type": "response.created", "response": self._told()}]

    def words(self, text: str) -> list[Event]:
        """More of the answer's words."""
        events = list(self._opened())
        part = self._part
        part.text = (part.text or "") + text
        kind = (
            "response.output_text.delta" if self.form.modality == "text" else "response.output_audio_transcript.delta"
        )
        return [*events, self._at({"type": kind, "delta": text})]

    def sound(self, data: bytes) -> list[Event]:
        """More of the answer's sound, in the format of the wire."""
        events = list(self._opened())
        part = self._part
        part.audio = (part.audio or b"") + data
        part.seconds += seconds_of(len(data), self.form.format)
        step = round(_DELTA_SECONDS / seconds_of(2, self.form.format)) * 2
        for start in range(0, len(data), step):
            delta = base64.b64encode(data[start : start + step]).decode()
            events.append(self._at({"type": "response.output_audio.delta", "delta": delta}))
        return events

    def whole(self, reply: Reply) -> list[Event]:
        """Nothing follows."""
        cut = reply.finish == "length"
        self._usage = usage(reply)
        return self._end(
            "incomplete" if cut else "completed",
            {"type": "incomplete", "reason": "max_output_tokens"} if cut else None,
        )

    def cancelled(self, reason: Reason) -> list[Event]:
        return self._end("cancelled", {"type": "cancelled", "reason": reason})

    def failed(self, error: ApiError) -> list[Event]:
        told = {"type": error.type, "code": error.code, "message": error.message}
        return self._end("failed", {"type": "failed", "error": told})

    def _end(self, status: Literal["completed", "cancelled", "failed", "incomplete"], details: Any) -> list[Event]:
        self.status, self._details = status, details
        events = list(self._closed("completed" if status == "completed" else "incomplete"))
        return [*events, {"type": "response.done", "response": self._told()}]

    def _opened(self) -> Iterator[Event]:
        if self.item:
            return
        kind: Any = "output_text" if self.form.modality == "text" else "output_audio"
        self._previous = self._last()
        self.item = Item(new_id("item"), "assistant", [], "in_progress")
        yield self._of_item("response.output_item.added")
        if self.form.conversation:
            yield {"type": "conversation.item.added", "previous_item_id": self._previous, "item": self.item.told()}
        self.item.parts.append(Part(kind, text=""))
        yield self._at({"type": "response.content_part.added", "part": self._told_part(whole=False)})

    def _closed(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        if not self.item:
            return
        self.item.status = status
        if self.form.modality == "audio":
            yield self._at({"type": "response.output_audio.done"})
            yield self._at({"type": "response.output_audio_transcript.done", "transcript": self._part.text or ""})
        else:
            yield self._at({"type": "response.output_text.done", "text": self._part.text or ""})
        yield self._at({"type": "response.content_part.done", "part": self._told_part(whole=True)})
        if self.form.conversation:
            yield {"type": "conversation.item.done", "previous_item_id": self._previous, "item": self.item.told()}
        yield self._of_item("response.output_item.done")

    @property
    def _part(self) -> Part:
        assert self.item is not None
        return self.item.parts[0]

    def _told_part(self, *, whole: bool) -> dict[str, Any]:
        text = self._part.text if whole else ""
        if self.form.modality == "text":
            return {"type": "text", "text": text}
        return {"type": "audio", "transcript": text}

    def _at(self, event: Event) -> Event:
        assert self.item is not None
        place = {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}
        return {**event, **place}

    def _of_item(self, type: str) -> Event:
        assert self.item is not None
        return {"type": type, "response_id": self.id, "output_index": 0, "item": self.item.told()}

    def _told(self) -> dict[str, Any]:
        form = self.form
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": self.status,
            "status_details": self._details,
            "output": [self.item.told()] if self.item else [],
            "conversation_id": form.conversation,
            "output_modalities": [form.modality],
            "max_output_tokens": form.max_output_tokens,
            "audio": {"output": {"format": form.format.model_dump(), "voice": form.voice}},
            "usage": self._usage,
            "metadata": form.metadata,
        }


def usage(reply: Reply) -> dict[str, Any]:
    read, made = reply.prompt_text_tokens + reply.prompt_audio_tokens, reply.text_tokens + reply.audio_tokens
    return {
        "total_tokens": read + made,
        "input_tokens": read,
        "output_tokens": made,
        "input_token_details": {
            "text_tokens": reply.prompt_text_tokens,
            "audio_tokens": reply.prompt_audio_tokens,
            "image_tokens": 0,
            "cached_tokens": 0,
            "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 0, "image_tokens": 0},
        },
        "output_token_details": {"text_tokens": reply.text_tokens, "audio_tokens": reply.audio_tokens},
    }
