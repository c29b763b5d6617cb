"""A voice behind HTTP: any service with OpenAI's route for speech (`POST …/audio/speech`)."""

import io
import os
import random
import time

import httpx
import numpy as np
import soundfile

from speechgpt.speech.config import SpeechServiceSection

_TRY_AGAIN = {408, 409, 425, 429}
_LONGEST_WAIT = 60.0
"""Seconds; a service that asks for more is asked again after these."""
_SPEEDS = (0.25, 4.0)
"""What the route takes."""


class HttpVoiceError(RuntimeError):
    """A service that gave no speech; the message says what it answered, and never the key."""


class HttpVoice:
    """Asks a service to speak. Its key is read from the environment when it speaks, and is written nowhere."""

    def __init__(self, service: SpeechServiceSection) -> None:
        self._service = service
        self._client: httpx.Client | None = None

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """(text, the service's name of the voice, speed) -> (mono float32 samples, Hz). Raises HttpVoiceError."""
        body = {"model": self._service.model, "input": text, "voice": voice, "response_format": "wav"}
        if speed != 1.0:
            body["speed"] = round(min(max(speed, _SPEEDS[0]), _SPEEDS[1]), 4)  # type: ignore[assignment]
        sound = self._post(body)
        try:
            samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
        except (RuntimeError, OSError) as error:
            raise HttpVoiceError(f"{self._service.url}: no WAV file came back ({len(sound)} bytes): {error}") from None
        return samples.mean(axis=1), rate

    def _post(self, body: dict[str, str]) -> bytes:
        """The answer's body; asked again, later each time, while the service is busy or cannot be reached."""
        for attempt in range(self._service.retries + 1):
            try:
                answer = self._connected().post("audio/speech", json=body)
            except httpx.HTTPError as error:
                problem, wait = f"{type(error).__name__}: {error}", None
            else:
                if answer.is_success:
                    return answer.content
                problem = f"{answer.status_code}: {answer.text[:200]}"
                if answer.status_code not in _TRY_AGAIN and answer.status_code < 500:
                    raise HttpVoiceError(f"{self._service.url}: {problem}{self._about_key(answer.status_code)}")
                wait = _asked_wait(answer)
            if attempt < self._service.retries:
                time.sleep(_wait(attempt, wait))
        raise HttpVoiceError(f"{self._service.url}: no speech after {self._service.retries + 1} attempts: {problem}")

    def _connected(self) -> httpx.Client:
        if self._client is None:
            key = os.environ.get(self._service.key_variable, "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            base = self._service.url.rstrip("/") + "/"
            self._client = httpx.Client(base_url=base, headers=headers, timeout=self._service.timeout_seconds)
        return self._client

    def _about_key(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        name = self._service.key_variable
        return f" (the key comes from {name}, which is {'set' if os.environ.get(name) else 'not set'})"


def _asked_wait(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _wait(attempt: int, asked: float | None) -> float:
    """Half a second, doubled each time, give or take a quarter, so that many workers do not come back together."""
    wait = asked if asked is not None else 0.5 * 2**attempt * random.uniform(0.75, 1.25)
    return min(wait, _LONGEST_WAIT)
