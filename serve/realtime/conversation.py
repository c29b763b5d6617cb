"""What was said in a session: items, and the history in words that the next answer is asked with."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from serve.encoder import Heard
from serve.errors import ApiError

if TYPE_CHECKING:
    from speechgpt.language.prompts import Turn

Role = Literal["user", "assistant", "system"]
Status = Literal["completed", "incomplete", "in_progress"]


@dataclass
class Part:
    """One part of an item. text: its words; None for sound that nobody has written down. seconds: length of its sound.
    audio: the sound as it was on the wire, None when it was dropped. heard: sound as the model takes it."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio"]
    text: str | None = None
    audio: bytes | None = None
    seconds: float = 0.0
    heard: Heard | None = None

    def told(self, *, with_audio: bool = False) -> dict[str, Any]:
        if not self.type.endswith("audio"):
            return {"type": self.type, "text": self.text or ""}
        body: dict[str, Any] = {"type": self.type, "transcript": self.text}
        if with_audio:
            body["audio"] = None if self.audio is None else base64.b64encode(self.audio).decode()
        return body


@dataclass
class Item:
    """whole_seconds: of an answer that was broken off, how long it would have taken to say; 0 where it was said."""

    id: str
    role: Role
    parts: list[Part]
    status: Status = "completed"
    whole_seconds: float = 0.0

    def told(self, *, with_audio: bool = False) -> dict[str, Any]:
        """As `item` of a server event. Sound only where it is asked for."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [part.told(with_audio=with_audio) for part in self.parts],
        }


@dataclass
class Conversation:
    """max_items: beyond them the oldest are deleted. max_seconds: of sound that is kept; beyond it the oldest sound is
    dropped, its words stay."""

    max_items: int
    max_seconds: float
    items: list[Item] = field(default_factory=list)
    _forgotten: set[str] = field(default_factory=set)

    def add(self, item: Item, after: str | None = None) -> tuple[str | None, list[str]]:
        """Returns the id of the item before it (None at the front), and of those that were deleted to make room.

        after: None is the end, `root` the front. Raises ApiError for an id that is taken or unknown.
        """
        if any(item.id == other.id for other in self.items):
            raise ApiError(400, f"item.id: {item.id!r} is taken", code="invalid_value", param="item.id")
        place = len(self.items)
        if after == "root":
            place = 0
        elif after is not None:
            place = self._place(after, "previous_item_id") + 1
        self.items.insert(place, item)
        previous = self.items[place - 1].id if place else None
        self._drop_old_audio()
        deleted = [old.id for old in self.items[: max(0, len(self.items) - self.max_items)] if old is not item]
        for id in deleted:
            self.delete(id)
        return previous, deleted

    @property
    def last_id(self) -> str | None:
        return self.items[-1].id if self.items else None

    def find(self, id: str, param: str = "item_id") -> Item:
        return self.items[self._place(id, param)]

    def delete(self, id: str) -> None:
        del self.items[self._place(id, "item_id")]
        self._forgotten.discard(id)

    def truncate(self, id: str, content_index: int, audio_end_ms: int) -> None:
        """Cut a spoken answer to what was heard of it. Raises ApiError."""
        item = self.find(id)
        if item.role != "assistant":
            raise ApiError(400, "item_id: only an answer can be truncated", code="invalid_value", param="item_id")
        if content_index >= len(item.parts) or item.parts[content_index].type != "output_audio":
            raise ApiError(400, "content_index: there is no spoken part", code="invalid_value", param="content_index")
        part, heard = item.parts[content_index], audio_end_ms / 1000
        # Clients round, each in a way of its own.
        if heard > part.seconds + 0.1:
            raise ApiError(
                400,
                f"audio_end_ms: {audio_end_ms} is beyond the {part.seconds * 1000:.0f} ms of sound there are",
                code="invalid_value",
                param="audio_end_ms",
            )
        whole = max(part.seconds, item.whole_seconds)
        part.text = heard_words(part.text or "", heard / whole if whole else 0.0)
        if part.audio is not None and part.seconds:
            part.audio = part.audio[: round(len(part.audio) * min(1.0, heard / part.seconds)) // 2 * 2]
        item.whole_seconds, part.seconds = 0.0, min(heard, part.seconds)

    def forget(self, exchanges: int) -> None:
        """Leave the oldest exchanges of the history out from now on; their items stay."""
        for exchange in list(_exchanges(self._remembered()))[:exchanges]:
            self._forgotten.update(item.id for item in exchange)

    def history(self) -> list[Item]:
        """The items that the next answer is asked with."""
        return list(self._remembered())

    def _remembered(self) -> Iterator[Item]:
        return (item for item in self.items if item.id not in self._forgotten)

    def _place(self, id: str, param: str) -> int:
        for place, item in enumerate(self.items):
            if item.id == id:
                return place
        raise ApiError(404, f"{param}: there is no item {id[:64]!r}", code="item_not_found", param=param)

    def _drop_old_audio(self) -> None:
        kept = 0.0
        for item in reversed(self.items):
            for part in reversed(item.parts):
                kept += part.seconds if part.audio is not None else 0.0
                if kept > self.max_seconds:
                    part.audio = None


def heard_words(text: str, share: float) -> str:
    """The words that were whole by then, as if every character took as long as the next."""
    end = round(len(text) * min(1.0, max(0.0, share)))
    if end >= len(text):
        return text
    return text[: end + 1].rpartition(" ")[0]


def dialogue(items: Sequence[Item]) -> "list[Turn]":
    """The turns, alternating and ending with the user's. A last question that is one recording stays in units, all
    else is words; what nobody could understand is left out, and so is an answer without a question.

    Raises ApiError for a conversation in which nothing is asked.
    """
    from speechgpt.language.prompts import Turn

    turns: list[Turn] = []
    exchanges = list(_exchanges(items))
    for place, exchange in enumerate(exchanges):
        questions = [part for item in exchange if item.role == "user" for part in item.parts]
        answer = _words(part for item in exchange if item.role == "assistant" for part in item.parts)
        if place < len(exchanges) - 1:
            question = _words(questions)
            if question and answer:
                turns += [Turn("user", text=question), Turn("assistant", text=answer)]
            continue
        heard = [part.heard for part in questions if part.heard]
        if len(questions) == 1 and heard:
            return [*turns, Turn("user", units=heard[0].units)]
        if question := _words(questions):
            return [*turns, Turn("user", text=question)]
    raise ApiError(400, "The conversation has no question to answer.", code="empty_conversation")


def unwritten(items: Sequence[Item]) -> list[Part]:
    """The parts of spoken questions whose words `dialogue` will need and that have none."""
    exchanges = list(_exchanges(items))
    wanted: list[Part] = []
    for place, exchange in enumerate(exchanges):
        parts = [part for item in exchange if item.role == "user" for part in item.parts]
        if place == len(exchanges) - 1 and len(parts) == 1:
            continue
        wanted += [part for part in parts if part.heard and part.text is None]
    return wanted


def _exchanges(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Questions with what answered them: each begins with what a user says after an answer, or first of all."""
    exchange: list[Item] = []
    for item in items:
        if item.role == "system":
            continue
        if item.role == "user" and exchange and exchange[-1].role == "assistant":
            yield exchange
            exchange = []
        if item.role == "user" or exchange:
            exchange.append(item)
    if exchange:
        yield exchange


def _words(parts: Iterable[Part]) -> str:
    return " ".join(filter(None, ((part.text or "").strip() for part in parts)))
