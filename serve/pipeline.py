"""A bundle's three parts as a service uses them: over Serve handles, or loaded into this process."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.bundles import ENCODER, LANGUAGE_MODEL, VOCODER
from serve.calls import answered, streamed
from serve.encoder import Heard, Refused, hear
from serve.errors import Fault, from_serve
from serve.prompting import Prompter, Reply, Task, TooLong, Unfolded
from serve.vocoder import Line, synthesize
from serve.voice import Manner, Voiced, first_piece, voiced
from speechgpt.runtime.config import ServingSection


class Pipeline(Protocol):
    async def hear(self, clip: bytes) -> Heard | Refused: ...

    async def reply(self, task: Task) -> Reply | TooLong: ...

    async def speak(self, line: Line, format: str, rate: int) -> bytes: ...

    def unfold(self, task: Task) -> AsyncGenerator[Unfolded, None]:
        """A reply as it is generated. Closing this stops the work."""
        ...

    def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        """A reply as it is spoken. Closing this stops the work."""
        ...


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
        # Unchecked: a config file's bundle may come up after the gateway.
        encoder, language, vocoder = (
            serve.get_deployment_handle(name, application, _check_exists=False)
            for name in (ENCODER, LANGUAGE_MODEL, VOCODER)
        )
        return cls(encoder, language, vocoder, retry_after)

    async def hear(self, clip: bytes) -> Heard | Refused:
        return await self._call(self._encoder.hear.remote(clip))

    async def reply(self, task: Task) -> Reply | TooLong:
        return await self._call(self._language.reply.remote(task))

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        return await self._call(self._vocoder.speak.remote(line, format, rate))

    async def unfold(self, task: Task) -> AsyncGenerator[Unfolded, None]:
        response = self._language.options(stream=True).unfold.remote(task)
        async with aclosing(self._pieces(response)) as pieces:
            async for piece in pieces:
                yield piece

    async def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        response = self._vocoder.options(stream=True).voice.remote(task, manner)
        async with aclosing(self._pieces(response)) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces(self, response: Any) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(streamed(response)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Fault):
                        raise piece.told(self._retry_after)
                    yield piece
        except Exception as error:
            if told := from_serve(error, self._retry_after):
                raise told from error
            raise

    async def _call(self, response: Any) -> Any:
        try:
            return await answered(response)
        except Exception as error:
            if told := from_serve(error, self._retry_after):
                raise told from error
            raise


class OwnPipeline:
    """A bundle directory in this process."""

    def __init__(self, bundle: Path, serving: ServingSection) -> None:
        from speechgpt.speech.encoder import SpeechEncoder
        from speechgpt.speech.vocoder import Vocoder

        self._encoder = SpeechEncoder.load(bundle / "encoder")
        self._prompter = Prompter.load(bundle, serving)
        self._vocoder = Vocoder.load(bundle / "vocoder")
        self._first = first_piece(self._vocoder)
        self._max_seconds = serving.max_audio_seconds

    async def hear(self, clip: bytes) -> Heard | Refused:
        return await hear(
            clip, self._max_seconds, lambda wave: asyncio.to_thread(lambda: self._encoder.encode([wave])[0])
        )

    async def reply(self, task: Task) -> Reply | TooLong:
        return await self._prompter.reply(task)

    def unfold(self, task: Task) -> AsyncGenerator[Unfolded, None]:
        return self._prompter.unfold(task)

    def voice(self, task: Task, manner: Manner) -> AsyncGenerator[Voiced, None]:
        return voiced(self._prompter.unfold(task, self._first), self._vocoder, manner, asyncio.to_thread)

    async def speak(self, line: Line, format: str, rate: int) -> bytes:
        from speechgpt.speech.audio import encode

        [wave] = await asyncio.to_thread(synthesize, self._vocoder, [line])
        return encode(wave, format, rate)
