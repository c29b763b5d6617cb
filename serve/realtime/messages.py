"""Items as clients send them, read into items of the conversation."""

from typing import TYPE_CHECKING, NamedTuple

from serve.errors import ApiError
from serve.realtime.client_events import Message
from serve.realtime.conversation import Item, Part, Role
from serve.realtime.response import new_id
from serve.realtime.session_config import AudioFormat
from serve.realtime.sound import RATE, Incoming, decode_base64, from_pcm16, rate_of, seconds_of

if TYPE_CHECKING:
    import numpy as np


class Most(NamedTuple):
    """What one part of a message may hold."""

    characters: int
    seconds: float


def read_message(message: Message, param: str, format: AudioFormat, most: Most) -> "tuple[Item, dict[int, np.ndarray]]":
    """The item, and the sound (float32 [samples]) of those of its parts that are to be heard.

    param: where the message stands in its event. Raises ApiError.
    """
    parts: list[Part] = []
    waves: dict[int, np.ndarray] = {}
    for place, content in enumerate(message.content):
        words = content.transcript if content.text is None else content.text
        if len(words or "") > most.characters:
            raise ApiError(
                400,
                f"{param}.content.{place}: at most {most.characters} characters are taken",
                code="string_above_max_length",
                param=f"{param}.content.{place}",
            )
        if content.type == "input_audio":
            where = f"{param}.content.{place}.audio"
            data = decode_base64(content.audio or "", where)
            if seconds_of(len(data), format) > most.seconds:
                raise ApiError(400, f"{where}: above {most.seconds:g} s", code="audio_too_long", param=where)
            waves[place] = Incoming(format).push(data, last=True)
            part = recording(waves[place], format)
            part.text = content.transcript
            parts.append(part)
        elif message.role == "assistant":
            parts.append(Part("output_audio" if content.transcript is not None else "output_text", text=words))
        else:
            parts.append(Part("input_text", text=words))
    role: Role = message.role or "user"
    return Item(message.id or new_id("item"), role, parts), waves


def recording(wave: "np.ndarray", format: AudioFormat) -> Part:
    """A part that says nothing yet, its sound as the client would send it. wave: float32 [samples]."""
    from speechgpt.speech.audio import encode

    audio = from_pcm16(encode(wave, "pcm16", rate_of(format)), format)
    return Part("input_audio", audio=audio, seconds=len(wave) / RATE)
