"""The encoder deployment: a sound file in, units out."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.batching import Backlog, Batched
from serve.bundles import Source, open_bundle
from serve.worker import Worker
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.speech.units import Units


@dataclass(frozen=True)
class Heard:
    """One clip as the language model takes it. seconds: its length at 16 kHz."""

    units: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Refused:
    """A clip that cannot become units; `reason` and `detail` as in AudioError.

    A value, not an exception: it is the client's fault and no failure of the replica.
    """

    reason: str
    detail: str


class Encoder:
    def __init__(self, source: Source, serving: ServingSection) -> None:
        import numpy as np

        from speechgpt.speech.audio import SAMPLE_RATE
        from speechgpt.speech.encoder import SpeechEncoder

        self._max_seconds = serving.max_audio_seconds
        self._worker = Worker(serving.request_timeout_seconds)
        self._encoder = SpeechEncoder.load(open_bundle(source).directory / "encoder", device=serving.encoder.device)
        self._backlog = Backlog()
        self._units = Batched(self._encode, lambda wave: len(wave) / SAMPLE_RATE, serving.encoder, self._backlog)
        # A replica is ready once its model has run: the first pass allocates and, on a GPU, compiles.
        self._encoder.encode([np.full(SAMPLE_RATE, 0.01, np.float32)])

    async def hear(self, clip: bytes) -> Heard | Refused:
        """clip: a sound file of any format that `speechgpt.speech.audio` reads."""
        return await hear(clip, self._max_seconds, self._units)

    def clusters(self) -> int:
        return self._encoder.clusters

    async def _encode(self, waves: "list[np.ndarray]") -> "list[Units]":
        return await self._worker.run(lambda: self._encoder.encode(waves))

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._backlog.stats()

    def check_health(self) -> None:
        self._worker.check()


async def hear(clip: bytes, max_seconds: float, encode: "Callable[[np.ndarray], Awaitable[Units]]") -> Heard | Refused:
    """Decode a sound file and `encode` its samples."""
    from speechgpt.speech.activity import is_speech
    from speechgpt.speech.audio import SAMPLE_RATE, AudioError, decode

    try:
        wave = await asyncio.to_thread(decode, clip, max_seconds=max_seconds)
    except AudioError as error:
        return Refused(error.reason, error.detail)
    if not is_speech(wave):
        return Refused("no_speech", "nobody speaks in it: its level does not rise and fall as speech does")
    return Heard(tuple((await encode(wave)).units.tolist()), len(wave) / SAMPLE_RATE)
