"""Making units, and where they are needed words, of the sound in a session's items."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from serve import visits
from serve.dialogue import CLIPS_AT_ONCE
from serve.errors import ApiError, described
from serve.realtime.conversation import Item, unwritten
from serve.service import Service

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ray.serve")
_KIND = "conversation.item.input_audio_transcription"


class Hearing:
    """post: tells the client an event. start: begins a task that ends with the session."""

    def __init__(
        self,
        service: Service,
        post: Callable[[dict[str, Any]], None],
        start: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._service = service
        self._post = post
        self._start = start
        self._places = asyncio.Semaphore(CLIPS_AT_ONCE)
        self._tasks: dict[str, asyncio.Task[ApiError | None]] = {}

    @property
    def items(self) -> set[str]:
        """Ids of the items that are being heard, or could not be."""
        return set(self._tasks)

    def begin(self, item: Item, waves: "dict[int, np.ndarray]") -> None:
        """waves: the sound of those of its parts that are to be heard, float32 [samples]."""
        if waves:
            self._tasks[item.id] = self._start(self._heard(item, waves))

    def forget(self, id: str) -> None:
        if task := self._tasks.pop(id, None):
            task.cancel()

    async def understood(self, items: list[Item]) -> None:
        """Returns when all that is needed of the items is in units or words. Raises ApiError for a question that
        cannot be heard."""
        tasks = {item.id: self._tasks[item.id] for item in items if item.id in self._tasks}
        if tasks:
            await asyncio.wait(tasks.values())
        last = next((item for item in reversed(items) if item.role != "system"), None)
        if last and last.id in tasks and not tasks[last.id].cancelled() and (error := tasks[last.id].result()):
            raise error
        for part in unwritten(items):
            assert part.heard is not None
            async with self._place():
                part.text = await self._service.write_down(part.heard, "input")

    def write_down(self, item: Item) -> None:
        """Begin the transcription that a session has asked for, of a turn that no response has written down."""
        self._start(self._written_down(item))

    def being_transcribed(self, item: Item, text: str) -> None:
        """Tell more of the words."""
        self._post({"type": f"{_KIND}.delta", "item_id": item.id, "content_index": 0, "delta": text})

    def transcribed(self, item: Item) -> None:
        """Tell the whole words."""
        part = item.parts[0]
        told = {"transcript": part.text or "", "usage": {"type": "duration", "seconds": round(part.seconds, 3)}}
        self._post({"type": f"{_KIND}.completed", "item_id": item.id, "content_index": 0, **told})

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """For one piece of work. Raises ApiError where the key's quota is spent: not all that is heard is answered,
        which would be counted."""
        async with self._places:
            await visits.current().quota()
            yield

    async def _heard(self, item: Item, waves: "dict[int, np.ndarray]") -> ApiError | None:
        """Makes units of an item's sound. Returns why it cannot."""
        from speechgpt.speech.audio import encode

        try:
            for place, wave in waves.items():
                async with self._place():
                    item.parts[place].heard = await self._service.hear(encode(wave, "wav"), "audio")
        except ApiError as error:
            return error
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            return _unheard(error)
        self._tasks.pop(item.id, None)
        return None

    async def _written_down(self, item: Item) -> None:
        try:
            if (task := self._tasks.get(item.id)) and (error := await asyncio.shield(task)):
                raise error
            part = item.parts[0]
            if part.heard is None:
                return
            if part.text is None:
                async with self._place():
                    part.text = await self._service.write_down(part.heard, "audio")
            self.transcribed(item)
        except ApiError as error:
            self._failed(item, error)
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            self._failed(item, _unheard(error))

    def _failed(self, item: Item, error: ApiError) -> None:
        told = {"item_id": item.id, "content_index": 0, "error": error.body()["error"]}
        self._post({"type": f"{_KIND}.failed", **told})


def _unheard(error: Exception) -> ApiError:
    logger.error("a turn could not be heard: %s", described(error))
    return ApiError(500, "The server failed to hear this; its log has the reason.", code="internal_error")
