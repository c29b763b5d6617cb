"""What the parts of one session share."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from serve.errors import ApiError
from serve.meters import Meters
from serve.realtime.client_events import Message
from serve.realtime.conversation import Conversation, Item
from serve.realtime.hearing import Hearing
from serve.realtime.messages import Most, read_message
from serve.realtime.outbox import Outbox
from serve.realtime.response import new_id
from serve.realtime.session_config import SessionConfig
from serve.service import Service
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    import numpy as np


class Talk:
    """send: puts one text message on the wire; raises when the client is gone."""

    def __init__(
        self, service: Service, serving: ServingSection, meters: Meters, send: Callable[[str], Awaitable[None]]
    ) -> None:
        self.service = service
        self.serving = serving
        self.meters = meters
        self.longest = serving.realtime.max_buffered_seconds or serving.max_audio_seconds
        """Seconds of sound that a client may send for one turn."""
        self.outbox = Outbox(send)
        self.config = SessionConfig(model=service.model)
        self.conversation = Conversation(serving.realtime.max_items, serving.realtime.max_kept_seconds)
        self.conversation_id = new_id("conv")
        self.hearing = Hearing(service, self.outbox.post, self.start)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.leaving = False
        """The replica goes away."""
        self.last_turn = False
        """Somebody was speaking when it was told to, and is to be answered yet."""
        self.wake = asyncio.Event()
        """Set when what the session waits for may have changed."""
        self.last = time.monotonic()
        """When the client sent something, or an answer was whole."""
        self.quiet_from: float | None = None
        """When the last answer has been heard; a user who then says nothing is idle."""

    def read(self, message: Message, param: str) -> "tuple[Item, dict[int, np.ndarray]]":
        """See `read_message`."""
        most = Most(self.serving.max_text_characters, self.longest)
        return read_message(message, param, self.config.audio.input.format, most)

    def add(self, item: Item, after: str | None = None) -> None:
        """Of a client or of its sound; an answer is told by its response. Raises ApiError, as `Conversation.add`."""
        previous, deleted = self.conversation.add(item, after)
        for kind in ("added", "done"):
            told = {"previous_item_id": previous, "item": item.told()}
            self.outbox.post({"type": f"conversation.item.{kind}", **told})
        self.tell_deleted(deleted)

    def tell_deleted(self, ids: list[str]) -> None:
        for id in ids:
            self.hearing.forget(id)
            self.outbox.post({"type": "conversation.item.deleted", "item_id": id})

    def fault(self, error: ApiError, event_id: str | None) -> None:
        body = {**error.body()["error"], "event_id": event_id}
        self.outbox.post({"type": "error", "error": body})

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that ends with the session."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


def going_away() -> ApiError:
    return ApiError(503, "This part of the service is being replaced; connect again.", code="going_away")
