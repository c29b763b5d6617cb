"""A reply on its way to the ear: its words as they are, its units as sound, each as soon as it is there."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import Fault
from serve.prompting import Reply, TooLong, Unfolded, Units, Words

if TYPE_CHECKING:
    from speechgpt.speech.vocoder import Vocoder


@dataclass(frozen=True)
class Sound:
    """More bytes of the sound."""

    data: bytes


@dataclass(frozen=True)
class Manner:
    """How a reply is to sound. speed: times as fast as the vocoder would. format, rate: as in `SoundStream`."""

    format: str
    rate: int
    speed: float = 1.0


Voiced = Words | Sound | Reply | TooLong | Fault
"""What a spoken reply comes as, the whole Reply last; or a TooLong alone, or a Fault last."""


class Voice:
    """The sound of one reply, in the state that its next units need."""

    def __init__(self, vocoder: "Vocoder", manner: Manner) -> None:
        from speechgpt.speech.sound_stream import SoundStream
        from speechgpt.speech.streaming import VocoderStream

        self._waves = VocoderStream(vocoder, speed=manner.speed)
        self._bytes = SoundStream(manner.format, manner.rate)

    def push(self, units: list[int]) -> bytes:
        return self._bytes.push(self._waves.push(units))

    def finish(self) -> bytes:
        return self._bytes.push(self._waves.finish()) + self._bytes.finish()


async def voiced(
    pieces: AsyncGenerator[Unfolded, None],
    vocoder: "Vocoder",
    manner: Manner,
    run: Callable[[Callable[[list[int]], bytes], list[int]], Awaitable[bytes]],
) -> AsyncGenerator[Voiced, None]:
    """`pieces` with sound in place of units. run: calls the vocoder's work on these units, off the event loop."""
    voice: Voice | None = None

    def push(units: list[int]) -> bytes:
        nonlocal voice
        voice = voice or Voice(vocoder, manner)
        return voice.push(units)

    def finish(units: list[int]) -> bytes:
        assert voice is not None
        return voice.finish()

    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Units):
                data = await run(push, piece.units)
            else:
                data = await run(finish, []) if voice and isinstance(piece, Reply) else b""
            if data:
                yield Sound(data)
            if not isinstance(piece, Units):
                yield piece
