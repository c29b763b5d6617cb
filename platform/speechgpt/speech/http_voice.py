"""A voice behind HTTP: any service with OpenAI's route for speech (`POST …/audio/speech`)."""

import io

import numpy as np
import soundfile

from speechgpt.speech.config import SpeechServiceSection
from speechgpt.speech.http_service import HttpService, ServiceError

_SPEEDS = (0.25, 4.0)
"""What the route takes."""


class HttpVoiceError(RuntimeError):
    """A service that gave no speech; the message says what it answered, and never the key."""


class HttpVoice:
    """Asks a service to speak."""

    def __init__(self, section: SpeechServiceSection) -> None:
        self._model = section.model
        self._service = HttpService(section, wanted="speech")

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """(text, the service's name of the voice, speed) -> (mono float32 samples, Hz). Raises HttpVoiceError."""
        body = {"model": self._model, "input": text, "voice": voice, "response_format": "wav"}
        if speed != 1.0:
            body["speed"] = round(min(max(speed, _SPEEDS[0]), _SPEEDS[1]), 4)  # type: ignore[assignment]
        try:
            sound = self._service.post("audio/speech", body).content
        except ServiceError as error:
            raise HttpVoiceError(str(error)) from None
        try:
            samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
        except (RuntimeError, OSError) as error:
            raise HttpVoiceError(
                f"{self._service.section.url}: no WAV file came back ({len(sound)} bytes): {error}"
            ) from None
        return samples.mean(axis=1), rate
