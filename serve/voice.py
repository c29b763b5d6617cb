"""A reply on its way to the ear: its words as they are, its units as sound, each as soon as it is there."""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.errors import Fault
from serve.prompting import Reply, TooLong, Unfolded, Units, Words

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.speech.vocoder import Vocoder


@dataclass(frozen=True)
class Sound:
    """More bytes of the sound, and how much of it was made for them (a compressed format keeps some back)."""

    data: bytes
    seconds: float = 0.0


@dataclass(frozen=True)
class Manner:
    """How a reply is to sound. speed: times as fast as the vocoder would. format, rate: as in `SoundStream`."""

    format: str
    rate: int
    speed: float = 1.0


_FRAMES_A_UNIT, _NEXT_UNITS, _FURTHER = 1.8, 2, 2
"""How long merged units are, and how many behind it a predicted duration looks at; and what makes the first sound last
until the next."""
Voiced = Words | Sound | Reply | TooLong | Fault
"""What a spoken reply comes as, the whole Reply last; or a TooLong alone, or a Fault last."""


class Voice:
    """The sound of one reply, in the state that its next units need."""

    def __init__(self, vocoder: "Vocoder", manner: Manner) -> None:
        from speechgpt.speech.sound_stream import SoundStream
        from speechgpt.speech.streaming import VocoderStream

        self._waves = VocoderStream(vocoder, speed=manner.speed)
        self._bytes = SoundStream(manner.format, manner.rate)
        self._untold = 0.0

    def push(self, units: list[int]) -> Sound:
        wave = self._waves.push(units)
        return self._sound(wave, self._bytes.push(wave))

    def finish(self) -> Sound:
        wave = self._waves.finish()
        return self._sound(wave, self._bytes.push(wave) + self._bytes.finish())

    def _sound(self, wave: "np.ndarray", data: bytes) -> Sound:
        from speechgpt.speech.audio import SAMPLE_RATE

        seconds = self._untold + len(wave) / SAMPLE_RATE
        self._untold = 0.0 if data else seconds
        return Sound(data, seconds)


def first_piece(vocoder: "Vocoder") -> int:
    """Units with which a reply should begin: as many as the first sound waits for at a usual pace, and a few more.

    It is tried, so that a replica is warm by then.
    """
    from speechgpt.speech.streaming import VocoderStream

    stream, frames = VocoderStream(vocoder), 1
    while not len(stream.push([0], [1])):
        frames += 1
    if vocoder.model.dur_predictor is None:
        return frames + _FURTHER
    return math.ceil(frames / _FRAMES_A_UNIT) + _NEXT_UNITS + _FURTHER


async def voiced(
    pieces: AsyncGenerator[Unfolded, None],
    vocoder: "Vocoder",
    manner: Manner,
    run: Callable[[Callable[[list[int]], Sound], list[int]], Awaitable[Sound]],
) -> AsyncGenerator[Voiced, None]:
    """`pieces` with sound in place of units. run: calls the vocoder's work on these units, off the event loop."""
    voice: Voice | None = None

    def push(units: list[int]) -> Sound:
        nonlocal voice
        voice = voice or Voice(vocoder, manner)
        return voice.push(units)

    def finish(units: list[int]) -> Sound:
        assert voice is not None
        return voice.finish()

    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Units):
                sound = await run(push, piece.units)
            else:
                sound = await run(finish, []) if voice and isinstance(piece, Reply) else Sound(b"")
            if sound.data:
                yield sound
            if not isinstance(piece, Units):
                yield piece
