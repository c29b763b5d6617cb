"""The vocoder deployment: units in, a sound file out; or a task in, and its reply out as it is made."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.batching import Backlog, Batched
from serve.bundles import LANGUAGE_MODEL, Source, open_bundle
from serve.calls import streamed
from serve.errors import fault_of
from serve.meters import VoiceMeters
from serve.prompting import Task
from serve.voice import Manner, Sound, Voiced, first_piece, voiced
from serve.worker import Worker
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.speech.vocoder import Vocoder


_UNIT_SECONDS = 0.04
"""Merged units last about two frames."""


@dataclass(frozen=True)
class Line:
    """Merged units to be spoken, `speed` times as fast as the vocoder would."""

    units: list[int]
    speed: float = 1.0


class VocoderDeployment:
    def __init__(self, source: Source, serving: ServingSection) -> None:
        from speechgpt.speech.vocoder import Vocoder

        self._worker = Worker(serving.request_timeout_seconds)
        self._vocoder = Vocoder.load(open_bundle(source).directory / "vocoder", device=serving.vocoder.device)
        self._backlog, self._meters = Backlog(), VoiceMeters()
        self._waves = Batched(self._synthesize, lambda line: _seconds(line.units), serving.vocoder, self._backlog)
        synthesize(self._vocoder, [Line([0])])
        self._first = first_piece(self._vocoder)

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        """A sound file of `format` (as in `speechgpt.speech.audio.encode`) at `rate` Hz."""
        from speechgpt.speech.audio import SAMPLE_RATE, encode

        wave = await self._waves(line)
        self._meters.made(len(wave) / SAMPLE_RATE)
        return await asyncio.to_thread(encode, wave, format, rate)

    async def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        """The reply to a task as it is made, its units as sound.

        Asked of the vocoder, not of the language model, because the context that the next sound needs stays here: it
        lives as long as this call, and goes with a caller who goes away.
        """
        reply = streamed(self._language.unfold.remote(task, self._first))
        try:
            async with aclosing(voiced(reply, self._vocoder, manner, self._run)) as pieces:
                with self._meters.streamed() as heard:
                    async for piece in pieces:
                        if isinstance(piece, Sound):
                            heard(piece.seconds)
                        yield piece
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            yield fault

    @cached_property
    def _language(self) -> DeploymentHandle:
        # The language model holds a handle of the vocoder, so this one cannot be given when they are deployed.
        application = serve.get_replica_context().app_name
        return serve.get_deployment_handle(LANGUAGE_MODEL, application).options(stream=True)

    def units(self) -> int:
        return self._vocoder.units

    async def _run(self, work: Callable[[list[int]], Sound], units: list[int]) -> Sound:
        with self._backlog.holding(_seconds(units)):
            return await self._worker.run(lambda: work(units))

    async def _synthesize(self, lines: list[Line]) -> "list[np.ndarray]":
        return await self._worker.run(lambda: synthesize(self._vocoder, lines))

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._backlog.stats()

    def check_health(self) -> None:
        self._worker.check()


def _seconds(units: list[int]) -> float:
    """Of sound, about: how long they are the vocoder alone knows."""
    return len(units) * _UNIT_SECONDS


def synthesize(vocoder: "Vocoder", lines: list[Line]) -> "list[np.ndarray]":
    """float32 [samples] at 16 kHz of each line."""
    units = [line.units for line in lines]
    predicted = vocoder.durations(units)
    durations = [at_speed(frames, line.speed) for frames, line in zip(predicted, lines, strict=True)]
    return vocoder.synthesize(units, durations=durations)


def at_speed(durations: "np.ndarray", speed: float) -> list[int]:
    """Frames of each unit at another speed.

    The ends of the units are rounded, not their lengths, so that no error adds up. Fast speech loses its shortest
    units.
    """
    import numpy as np

    ends = np.rint(np.cumsum(durations) / speed).astype(np.int64)
    return np.diff(ends, prepend=0).tolist()
