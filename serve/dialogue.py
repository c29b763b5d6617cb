"""OpenAI messages as the dialogue that the language model is asked."""

import asyncio
import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serve.calls import together
from serve.encoder import Heard
from serve.errors import ApiError
from serve.memory import Exchange
from serve.wire import AssistantMessage, AudioPart, Message, TextPart, UserMessage

CLIPS_AT_ONCE = 4
"""Of one request or session are being heard, or written down. Others want to be heard, too."""

if TYPE_CHECKING:
    from speechgpt.language.prompts import Turn


class Listener(Protocol):
    """What understanding a dialogue needs of the service."""

    async def hear(self, clip: bytes, param: str) -> Heard: ...

    async def write_down(self, heard: Heard, param: str) -> str: ...

    async def recall(self, audio_id: str) -> Exchange | None: ...


@dataclass(frozen=True)
class _Part:
    """One part of a user message: words, or a clip that was heard."""

    text: str = ""
    heard: Heard | None = None


async def understand(
    messages: list[Message], listener: Listener, max_characters: int, max_seconds: float
) -> "list[Turn]":
    """The turns, alternating and ending with the user's. Instructions are none.

    A last message that is one recording is a spoken question, and stays in units. Everything else becomes text,
    recordings written down where they stand: the model's history is text, and so is a question that mixes both.

    max_characters, max_seconds: of all messages together. Raises ApiError naming the message and part.
    """
    from speechgpt.language.prompts import Turn

    said = [(f"messages.{place}", message) for place, message in enumerate(messages) if message.is_said]
    _check_order(said)
    _check_length(messages, max_characters)
    names = [name for name, _ in said]
    users = {place: message for place, (_, message) in enumerate(said) if isinstance(message, UserMessage)}
    ear = _Ear(listener, max_seconds)
    recalled = await together(*(_recall(message, name, listener) for name, message in said))
    heard = await together(*(_listen(message, names[place], ear) for place, message in users.items()))
    parts_of = dict(zip(users, heard, strict=True))
    *_, last = parts_of.values()
    *earlier, _ = range(len(said))

    async def turn(place: int) -> Turn:
        if place not in parts_of:
            return Turn("assistant", text=_answer_text(said[place][1], recalled[place], names[place]))
        parts = parts_of[place]
        answered = recalled[place + 1]
        if len(parts) == 1 and parts[0].heard and answered and answered.question:
            # The reply that refers to this question knows what was asked.
            return Turn("user", text=answered.question)
        return Turn("user", text=await _in_words(parts, names[place], ear))

    turns = await together(*map(turn, earlier))
    if len(last) == 1 and last[0].heard:
        return [*turns, Turn("user", units=last[0].heard.units)]
    return [*turns, Turn("user", text=await _in_words(last, names[-1], ear))]


def _check_order(said: list[tuple[str, Message]]) -> None:
    for place, (name, message) in enumerate(said):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            raise ApiError(
                400,
                f"{name}: a dialogue alternates user and assistant messages; here {expected} was expected",
                code="invalid_value",
                param=f"{name}.role",
            )


def _check_length(messages: list[Message], max_characters: int) -> None:
    characters = 0
    for message in messages:
        characters += sum(len(part.text) for part in message.content or [] if isinstance(part, TextPart))
    if characters > max_characters:
        raise ApiError(
            400,
            f"messages: {characters} characters of text; at most {max_characters} are taken",
            code="string_above_max_length",
            param="messages",
        )


class _Ear:
    """Hears the clips of one request, until they are too much, and writes them down."""

    def __init__(self, listener: Listener, max_seconds: float) -> None:
        self._listener, self._max_seconds = listener, max_seconds
        self._places = asyncio.Semaphore(CLIPS_AT_ONCE)
        self._seconds = 0.0

    async def hear(self, clip: bytes, param: str) -> Heard:
        async with self._places:
            heard = await self._listener.hear(clip, param)
        self._seconds += heard.seconds
        if self._seconds > self._max_seconds:
            raise ApiError(
                400,
                f"messages: more than {self._max_seconds:g} s of sound; so much is taken in one request",
                code="audio_too_long",
                param=param,
            )
        return heard

    async def write_down(self, heard: Heard, param: str) -> str:
        async with self._places:
            return await self._listener.write_down(heard, param)


async def _listen(message: UserMessage, param: str, ear: _Ear) -> list[_Part]:
    parts = await together(
        *(_part(part, f"{param}.content.{place}", ear) for place, part in enumerate(message.content))
    )
    if not any(part.heard or part.text for part in parts):
        raise ApiError(400, f"{param}: neither text nor audio", code="empty_content", param=f"{param}.content")
    return [part for part in parts if part.heard or part.text]


async def _part(part: TextPart | AudioPart, param: str, ear: _Ear) -> _Part:
    if isinstance(part, TextPart):
        return _Part(text=part.text.strip())
    try:
        clip = base64.b64decode(part.input_audio.data, validate=True)
    except ValueError:
        raise ApiError(
            400, f"{param}.input_audio.data is not base64", code="invalid_base64", param=f"{param}.input_audio.data"
        ) from None
    return _Part(heard=await ear.hear(clip, f"{param}.input_audio.data"))


async def _recall(message: Message, param: str, listener: Listener) -> Exchange | None:
    if not isinstance(message, AssistantMessage) or message.audio is None:
        return None
    exchange = await listener.recall(message.audio.id)
    if exchange is None:
        raise ApiError(
            404,
            f"{param}.audio.id: no spoken answer {message.audio.id!r} is remembered; it may have expired",
            code="audio_not_found",
            param=f"{param}.audio.id",
        )
    return exchange


def _answer_text(message: Message, recalled: Exchange | None, param: str) -> str:
    if recalled and recalled.answer:
        return recalled.answer
    text = " ".join(part.text for part in message.content or [] if isinstance(part, TextPart)).strip()
    if not text:
        raise ApiError(400, f"{param}: neither content nor audio.id", code="empty_content", param=f"{param}.content")
    return text


async def _in_words(parts: list[_Part], param: str, ear: _Ear) -> str:
    async def in_words(part: _Part) -> str:
        return await ear.write_down(part.heard, param) if part.heard else part.text

    words = await together(*map(in_words, parts))
    text = " ".join(filter(None, words))
    if not text:
        raise ApiError(400, f"{param}: no words were recognised", code="no_speech", param=f"{param}.content")
    return text
