"""One session: the client's events taken one after the other, and at most one response made beside them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from serve.errors import ApiError, described
from serve.meters import Meters
from serve.realtime import client_events as events
from serve.realtime.answering import Answers
from serve.realtime.response import new_id
from serve.realtime.sound import decode_base64
from serve.realtime.talk import Talk, going_away
from serve.realtime.turns import Turns
from serve.service import Service
from speechgpt.runtime.config import ServingSection

logger = logging.getLogger("ray.serve")
GOING_AWAY, RESTARTING = 1001, 1012
_FLUSH_SECONDS = 5.0


class Ending(NamedTuple):
    """Why a session is over: a close code, and words for it."""

    code: int
    reason: str


class Session:
    """send: puts one text message on the wire; raises when the client is gone. Of one asyncio task, and those that it
    starts; they are gone when `run` returns."""

    def __init__(
        self, service: Service, serving: ServingSection, meters: Meters, send: Callable[[str], Awaitable[None]]
    ) -> None:
        self._talk = Talk(service, serving, meters, send)
        self._limits = serving.realtime
        self._answers = Answers(self._talk)
        self._turns = Turns(self._talk, self._answers)

    def leave(self) -> None:
        """The replica goes away: say so, and end when what is being said is answered."""
        if not self._talk.leaving:
            self._talk.leaving, self._talk.last_turn = True, self._turns.speaking
            self._talk.fault(going_away(), None)
            self._talk.wake.set()

    async def run(self, receive: Callable[[], Awaitable[str | bytes | None]]) -> Ending | None:
        """Until the client goes, or has to. receive: the next message, None when the client is gone."""
        began = self._talk.last = time.monotonic()
        sender = self._talk.start(self._deliver())
        session = {**self._talk.config.told(), "id": new_id("sess")}
        session["expires_at"] = int(time.time() + self._limits.max_session_seconds)
        self._talk.outbox.post({"type": "session.created", "session": session})
        receiving: asyncio.Task[str | bytes | None] | None = None
        waking: asyncio.Task[Any] | None = None
        try:
            while True:
                receiving = receiving or asyncio.create_task(_awaited(receive()))
                waking = waking or asyncio.create_task(_awaited(self._talk.wake.wait()))
                until = self._until(began)
                done, _ = await asyncio.wait(
                    {receiving, waking, sender},
                    timeout=max(0.0, until - time.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if sender in done:
                    return None
                if receiving in done:
                    message, receiving = receiving.result(), None
                    if message is None:
                        return None
                    self._talk.last = time.monotonic()
                    await self._take(message)
                    await self._either(self._talk.outbox.room(), sender)
                if waking in done:
                    self._talk.wake.clear()
                    waking = None
                if ending := await self._on_time(began):
                    await self._talk.outbox.flush(_FLUSH_SECONDS)
                    return ending
        finally:
            tasks = {*self._talk.tasks, *(task for task in (receiving, waking) if task)}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self) -> None:
        """Ends when the client is gone."""
        try:
            await self._talk.outbox.run()
        except Exception as error:  # noqa: BLE001 - servers tell it by exceptions of their own
            logger.debug("a session's client is gone: %s", described(error))

    async def _either(self, wanted: Coroutine[Any, Any, None], sender: asyncio.Task[Any]) -> None:
        """Returns when the one is done, or the sender, which ends only with the client."""
        task = asyncio.create_task(wanted)
        try:
            await asyncio.wait({task, sender}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()

    # What time brings.

    def _until(self, began: float) -> float:
        """When there is something to do though the client sends nothing."""
        times = [began + self._limits.max_session_seconds]
        if not self._answers.active:
            times.append(self._talk.last + self._limits.idle_seconds)
            if (idle := self._idle_from()) is not None:
                times.append(idle)
        return min(times)

    async def _on_time(self, began: float) -> Ending | None:
        now = time.monotonic()
        if self._talk.leaving and not self._answers.active and not self._turns.speaking:
            return Ending(RESTARTING, "this part of the service is being replaced; connect again")
        if now >= began + self._limits.max_session_seconds:
            await self._answers.break_off("client_cancelled")
            words = f"The session has reached its {self._limits.max_session_seconds:g} s."
            self._talk.fault(ApiError(400, words, code="session_expired"), None)
            return Ending(GOING_AWAY, "the session has reached its end")
        if self._answers.active:
            return None
        if now >= self._talk.last + self._limits.idle_seconds:
            words = f"Nothing came for {self._limits.idle_seconds:g} s."
            self._talk.fault(ApiError(400, words, code="session_idle"), None)
            return Ending(GOING_AWAY, "nothing came for too long")
        if (idle := self._idle_from()) is not None and now >= idle:
            await self._turns.prompt_idle()
        return None

    def _idle_from(self) -> float | None:
        detection = self._talk.config.audio.input.turn_detection
        if not detection or detection.idle_timeout_ms is None or self._talk.quiet_from is None or self._talk.leaving:
            return None
        if self._turns.speaking:
            return None
        return self._talk.quiet_from + detection.idle_timeout_ms / 1000

    # What the client sends.

    async def _take(self, message: str | bytes) -> None:
        event_id = None
        try:
            event = events.parse(message)
            event_id = event.event_id
            await self._handle(event)
        except events.Malformed as malformed:
            self._talk.fault(malformed.error, malformed.event_id)
        except ApiError as error:
            self._talk.fault(error, event_id)
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("an event of a session failed: %s", described(error))
            told = ApiError(500, "The server failed to take this; its log has the reason.", code="internal_error")
            self._talk.fault(told, event_id)

    async def _handle(self, event: events.Event) -> None:
        match event:
            case events.AppendAudio(audio=audio):
                await self._turns.append(decode_base64(audio, "audio"))
            case events.CommitAudio():
                self._turns.commit()
            case events.ClearAudio():
                self._turns.clear()
            case events.SessionUpdate(session=changes):
                self._update(changes)
            case events.CreateItem(item=message, previous_item_id=after):
                self._create(message, after)
            case events.DeleteItem(item_id=id):
                self._talk.conversation.delete(id)
                self._talk.hearing.forget(id)
                self._talk.outbox.post({"type": "conversation.item.deleted", "item_id": id})
            case events.RetrieveItem(item_id=id):
                item = self._talk.conversation.find(id).told(with_audio=True)
                self._talk.outbox.post({"type": "conversation.item.retrieved", "item": item})
            case events.TruncateItem(item_id=id, content_index=index, audio_end_ms=end):
                if (active := self._answers.active) and active.response.item and active.response.item.id == id:
                    # Whoever cuts an answer that is still being made wants no more of it.
                    await self._answers.break_off("client_cancelled")
                self._talk.conversation.truncate(id, index, end)
                told = {"item_id": id, "content_index": index, "audio_end_ms": end}
                self._talk.outbox.post({"type": "conversation.item.truncated", **told})
            case events.CreateResponse(response=params):
                await self._answers.begin(params)
            case events.CancelResponse(response_id=id):
                if not self._answers.active or id not in (None, self._answers.active.response.id):
                    raise ApiError(400, "There is no such response to cancel.", code="response_cancel_not_active")
                await self._answers.break_off("client_cancelled")

    def _update(self, changes: dict[str, Any]) -> None:
        self._talk.config = self._talk.config.updated(changes, self._talk.serving.max_text_characters)
        self._turns.adjust()
        self._talk.outbox.post({"type": "session.updated", "session": self._talk.config.told()})

    def _create(self, message: events.Message, after: str | None) -> None:
        if message.type == "item_reference":
            raise ApiError(400, "item.type: only the input of a response refers", code="invalid_value", param="item")
        item, waves = self._talk.read(message, "item")
        self._talk.add(item, after)
        self._talk.hearing.begin(item, waves)


async def _awaited(what: Awaitable[Any]) -> Any:
    return await what
