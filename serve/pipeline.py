"""A bundle's three parts as a service uses them: over Serve handles, or loaded into this process."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol, TypeVar

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.encoder import Heard, Refused, hear
from serve.errors import from_serve
from serve.prompting import Prompter, Reply, Task, TooLong
from serve.vocoder import Line, synthesize
from speechgpt.runtime.config import ServingSection

T = TypeVar("T")
ENCODER, LANGUAGE_MODEL, VOCODER = "Encoder", "LanguageModel", "Vocoder"
"""Names of a bundle's deployments in its application."""


class Pipeline(Protocol):
    async def hear(self, clip: bytes) -> Heard | Refused: ...

    async def reply(self, task: Task) -> Reply | TooLong: ...

    async def speak(self, line: Line, format: str, rate: int) -> bytes: ...


class ServedPipeline:
    """The deployments of a Serve application. Raises ApiError, 429 or 503, for what may pass by itself."""

    def __init__(
        self, encoder: DeploymentHandle, language: DeploymentHandle, vocoder: DeploymentHandle, retry_after: float
    ) -> None:
        self._encoder = encoder
        self._language = language
        self._vocoder = vocoder
        self._retry_after = retry_after

    @classmethod
    def of(cls, application: str, retry_after: float) -> "ServedPipeline":
        names = (ENCODER, LANGUAGE_MODEL, VOCODER)
        encoder, language, vocoder = (serve.get_deployment_handle(name, application) for name in names)
        return cls(encoder, language, vocoder, retry_after)

    async def hear(self, clip: bytes) -> Heard | Refused:
        return await self._call(self._encoder.hear.remote(clip))

    async def reply(self, task: Task) -> Reply | TooLong:
        return await self._call(self._language.reply.remote(task))

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        return await self._call(self._vocoder.speak.remote(line, format, rate))

    async def _call(self, response: Awaitable[T]) -> T:
        try:
            return await response
        except Exception as error:
            if told := from_serve(error, self._retry_after):
                raise told from error
            raise


class OwnPipeline:
    """A bundle directory in this process, one request at a time."""

    def __init__(self, bundle: Path, serving: ServingSection) -> None:
        from speechgpt.speech.encoder import SpeechEncoder
        from speechgpt.speech.vocoder import Vocoder

        self._encoder = SpeechEncoder.load(bundle / "encoder")
        self._prompter = Prompter.load(bundle)
        self._vocoder = Vocoder.load(bundle / "vocoder")
        self._max_seconds = serving.max_audio_seconds

    async def hear(self, clip: bytes) -> Heard | Refused:
        return await hear(
            clip, self._max_seconds, lambda wave: asyncio.to_thread(lambda: self._encoder.encode([wave])[0])
        )

    async def reply(self, task: Task) -> Reply | TooLong:
        prompt = self._prompter.prompt(task)
        if isinstance(prompt, TooLong):
            return prompt
        return (await asyncio.to_thread(self._prompter.generate, [prompt]))[0]

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        from speechgpt.speech.audio import encode

        [wave] = await asyncio.to_thread(synthesize, self._vocoder, [line])
        return encode(wave, format, rate)
