"""OpenAI messages as the dialogue that the language model is asked."""

import asyncio
import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from serve.encoder import Heard
from serve.errors import ApiError
from serve.memory import Exchange
from serve.wire import AssistantMessage, AudioPart, Message, TextPart, UserMessage

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


async def understand(messages: list[Message], listener: Listener, max_characters: int) -> "list[Turn]":
    """The turns, alternating and ending with the user's.

    A last message that is one recording is a spoken question, and stays in units. Everything else becomes text,
    recordings written down where they stand: the model's history is text, and so is a question that mixes both.

    Raises ApiError naming the message and part.
    """
    from speechgpt.language.prompts import Turn

    _check_order(messages)
    _check_length(messages, max_characters)
    users = [(place, message) for place, message in enumerate(messages) if isinstance(message, UserMessage)]
    heard, recalled = await asyncio.gather(
        asyncio.gather(*(_listen(message, f"messages.{place}", listener) for place, message in users)),
        asyncio.gather(*(_recall(message, f"messages.{place}", listener) for place, message in enumerate(messages))),
    )
    parts_of = {place: parts for (place, _), parts in zip(users, heard, strict=True)}
    *_, last = parts_of.values()
    *earlier, _ = range(len(messages))

    async def turn(place: int) -> Turn:
        if place not in parts_of:
            return Turn("assistant", text=_answer_text(messages[place], recalled[place], f"messages.{place}"))
        parts = parts_of[place]
        answered = recalled[place + 1]
        if len(parts) == 1 and parts[0].heard and answered and answered.question:
            # The reply that refers to this question knows what was asked.
            return Turn("user", text=answered.question)
        return Turn("user", text=await _in_words(parts, listener, f"messages.{place}"))

    turns = list(await asyncio.gather(*map(turn, earlier)))
    if len(last) == 1 and last[0].heard:
        return [*turns, Turn("user", units=last[0].heard.units)]
    return [*turns, Turn("user", text=await _in_words(last, listener, f"messages.{len(messages) - 1}"))]


def _check_order(messages: list[Message]) -> None:
    for place, message in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            raise ApiError(
                400,
                f"messages.{place}: a dialogue alternates user and assistant messages; here {expected} was expected",
                code="invalid_value",
                param=f"messages.{place}.role",
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


async def _listen(message: UserMessage, param: str, listener: Listener) -> list[_Part]:
    parts = await asyncio.gather(
        *(_part(part, f"{param}.content.{place}", listener) for place, part in enumerate(message.content))
    )
    if not any(part.heard or part.text for part in parts):
        raise ApiError(400, f"{param}: neither text nor audio", code="empty_content", param=f"{param}.content")
    return [part for part in parts if part.heard or part.text]


async def _part(part: TextPart | AudioPart, param: str, listener: Listener) -> _Part:
    if isinstance(part, TextPart):
        return _Part(text=part.text.strip())
    try:
        clip = base64.b64decode(part.input_audio.data, validate=True)
    except ValueError:
        raise ApiError(
            400, f"{param}.input_audio.data is not base64", code="invalid_base64", param=f"{param}.input_audio.data"
        ) from None
    return _Part(heard=await listener.hear(clip, f"{param}.input_audio.data"))


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


async def _in_words(parts: list[_Part], listener: Listener, param: str) -> str:
    async def in_words(part: _Part) -> str:
        return await listener.write_down(part.heard, param) if part.heard else part.text

    words = await asyncio.gather(*map(in_words, parts))
    text = " ".join(filter(None, words))
    if not text:
        raise ApiError(400, f"{param}: no words were recognised", code="no_speech", param=f"{param}.content")
    return text
