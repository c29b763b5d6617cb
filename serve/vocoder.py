"""The vocoder deployment: units in, a sound file out."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.batching import batched
from serve.bundles import Source, open_bundle
from serve.worker import Worker
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.speech.vocoder import Vocoder


@dataclass(frozen=True)
class Line:
    """Merged units to be spoken, `speed` times as fast as the vocoder would."""

    units: list[int]
    speed: float = 1.0


class VocoderDeployment:
    def __init__(self, source: Source, serving: ServingSection) -> None:
        from speechgpt.speech.vocoder import Vocoder

        self._worker = Worker(serving.request_timeout_seconds)
        self._vocoder = Vocoder.load(open_bundle(source).directory / "vocoder")
        self._waves = batched(self._synthesize, serving.vocoder)
        synthesize(self._vocoder, [Line([0])])

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        """A sound file of `format` (as in `speechgpt.speech.audio.encode`) at `rate` Hz."""
        from speechgpt.speech.audio import encode

        wave = await self._waves(line)
        return await asyncio.to_thread(encode, wave, format, rate)

    def units(self) -> int:
        return self._vocoder.units

    async def _synthesize(self, lines: list[Line]) -> "list[np.ndarray]":
        return await self._worker.run(lambda: synthesize(self._vocoder, lines))

    def check_health(self) -> None:
        self._worker.check()


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
