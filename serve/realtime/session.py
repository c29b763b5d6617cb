"""One session: the client's events taken one after the other, and at most one response made beside them."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from serve.errors import ApiError, deadline_passed, described
from serve.prompting import Reply, Words
from serve.realtime import client_events as events
from serve.realtime.conversation import Conversation, Item, Part, Role, dialogue, heard_words, unwritten
from serve.realtime.input_buffer import InputBuffer
from serve.realtime.meters import Meters
from serve.realtime.outbox import Outbox
from serve.realtime.response import Form, Reason, Response, new_id
from serve.realtime.session_config import SessionConfig
from serve.realtime.sound import RATE, Incoming, decode_base64, from_pcm16, milliseconds, rate_of, seconds_of
from serve.realtime.turn_detection import Started, Stopped, VoiceActivity
from serve.service import LivePiece, Service, check_voice
from serve.voice import Manner, Sound
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ray.serve")
GOING_AWAY, RESTARTING = 1001, 1012
_LEAST_SECONDS = 0.1
"""Less sound than this is no turn."""
_CHARACTERS_A_SECOND = 15.0
"""Pace of speech, until the session has heard the model's own."""
_FLUSH_SECONDS = 5.0


class Ending(NamedTuple):
    """Why a session is over: a close code, and words for it."""

    code: int
    reason: str


@dataclass
class Active:
    """The response under way. asked: the item whose one recording it answers. say: words of the service's own that it
    is. transcript: what the model has understood of the question. ended: nothing can break it off any more."""

    response: Response
    asked: Item | None
    say: str | None
    task: asyncio.Task[None] | None = None
    transcript: str = ""
    reason: Reason | None = None
    ended: bool = False


class Session:
    """send: puts one text message on the wire; raises when the client is gone. Of one asyncio task, and those that it
    starts; they are gone when `run` returns."""

    def __init__(
        self, service: Service, serving: ServingSection, meters: Meters, send: Callable[[str], Awaitable[None]]
    ) -> None:
        self._service = service
        self._serving = serving
        self._limits = serving.realtime
        self._longest = serving.realtime.max_buffered_seconds or serving.max_audio_seconds
        self._meters = meters
        self._outbox = Outbox(send)
        self._config = SessionConfig(model=service.served.name)
        self._conversation = Conversation(self._limits.max_items, self._limits.max_kept_seconds)
        self._conversation_id = new_id("conv")
        self._incoming = Incoming(self._config.audio.input.format)
        self._buffer = InputBuffer()
        self._activity: VoiceActivity | None = None
        self._turn = ""
        """Id of the item that the turn being spoken will be."""
        self._adjust_activity()
        self._active: Active | None = None
        self._hearing: dict[str, asyncio.Task[ApiError | None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._wake = asyncio.Event()
        self._leaving = False
        self._pace = _CHARACTERS_A_SECOND
        self._quiet_from: float | None = None
        """When the last answer has been heard; a user who then says nothing is idle."""

    def leave(self) -> None:
        """The replica goes away: say so, and end when the response under way is done."""
        if not self._leaving:
            self._leaving = True
            told = ApiError(503, "This part of the service is being replaced; connect again.", code="going_away")
            self._fault(told, None)
            self._wake.set()

    async def run(self, receive: Callable[[], Awaitable[str | bytes | None]]) -> Ending | None:
        """Until the client goes, or has to. receive: the next message, None when the client is gone."""
        began = self._last = time.monotonic()
        sender = self._start(self._deliver())
        session = {**self._config.told(), "id": new_id("sess")}
        session["expires_at"] = int(time.time() + self._limits.max_session_seconds)
        self._outbox.post({"type": "session.created", "session": session})
        receiving: asyncio.Task[str | bytes | None] | None = None
        waking: asyncio.Task[Any] | None = None
        try:
            while True:
                receiving = receiving or asyncio.create_task(_awaited(receive()))
                waking = waking or asyncio.create_task(_awaited(self._wake.wait()))
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
                    self._last = time.monotonic()
                    await self._take(message)
                    await self._either(self._outbox.room(), sender)
                if waking in done:
                    self._wake.clear()
                    waking = None
                if ending := await self._on_time(began):
                    await self._outbox.flush(_FLUSH_SECONDS)
                    return ending
        finally:
            tasks = {*self._tasks, *(task for task in (receiving, waking) if task)}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self) -> None:
        """Ends when the client is gone."""
        try:
            await self._outbox.run()
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
        if not self._active:
            times.append(self._last + self._limits.idle_seconds)
            if (idle := self._idle_from()) is not None:
                times.append(idle)
        return min(times)

    async def _on_time(self, began: float) -> Ending | None:
        now = time.monotonic()
        if self._leaving and not self._active:
            return Ending(RESTARTING, "this part of the service is being replaced; connect again")
        if now >= began + self._limits.max_session_seconds:
            await self._break_off("client_cancelled")
            words = f"The session has reached its {self._limits.max_session_seconds:g} s."
            self._fault(ApiError(400, words, code="session_expired"), None)
            return Ending(GOING_AWAY, "the session has reached its end")
        if self._active:
            return None
        if now >= self._last + self._limits.idle_seconds:
            words = f"Nothing came for {self._limits.idle_seconds:g} s."
            self._fault(ApiError(400, words, code="session_idle"), None)
            return Ending(GOING_AWAY, "nothing came for too long")
        if (idle := self._idle_from()) is not None and now >= idle:
            await self._prompt_idle()
        return None

    def _idle_from(self) -> float | None:
        detection = self._config.audio.input.turn_detection
        if not detection or detection.idle_timeout_ms is None or self._quiet_from is None or self._leaving:
            return None
        if self._activity and self._activity.speaking:
            return None
        return self._quiet_from + detection.idle_timeout_ms / 1000

    async def _prompt_idle(self) -> None:
        """Nobody has said anything: the service asks whether somebody is there."""
        start, end = self._buffer.start, self._buffer.end
        self._buffer.clear()
        item = Item(new_id("item"), "user", [Part("input_audio", text="")])
        times = {"audio_start_ms": milliseconds(start), "audio_end_ms": milliseconds(end)}
        self._outbox.post({"type": "input_audio_buffer.timeout_triggered", "item_id": item.id, **times})
        self._committed(item)
        await self._respond(None, say=self._limits.idle_prompt)

    # What the client sends.

    async def _take(self, message: str | bytes) -> None:
        event_id = None
        try:
            event = events.parse(message)
            event_id = event.event_id
            await self._handle(event)
        except events.Malformed as malformed:
            self._fault(malformed.error, malformed.event_id)
        except ApiError as error:
            self._fault(error, event_id)
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("an event of a session failed: %s", described(error))
            told = ApiError(500, "The server failed to take this; its log has the reason.", code="internal_error")
            self._fault(told, event_id)

    async def _handle(self, event: events.Event) -> None:
        match event:
            case events.AppendAudio(audio=audio):
                await self._append(decode_base64(audio, "audio"))
            case events.CommitAudio():
                self._commit_all()
            case events.ClearAudio():
                self._buffer.clear()
                self._adjust_activity(anew=True)
                self._outbox.post({"type": "input_audio_buffer.cleared"})
            case events.SessionUpdate(session=changes):
                self._update(changes)
            case events.CreateItem(item=message, previous_item_id=after):
                self._create(message, after)
            case events.DeleteItem(item_id=id):
                self._conversation.delete(id)
                self._forget_hearing(id)
                self._outbox.post({"type": "conversation.item.deleted", "item_id": id})
            case events.RetrieveItem(item_id=id):
                item = self._conversation.find(id).told(with_audio=True)
                self._outbox.post({"type": "conversation.item.retrieved", "item": item})
            case events.TruncateItem(item_id=id, content_index=index, audio_end_ms=end):
                if self._active and self._active.response.item and self._active.response.item.id == id:
                    # Whoever cuts an answer that is still being made wants no more of it.
                    await self._break_off("client_cancelled")
                self._conversation.truncate(id, index, end)
                told = {"item_id": id, "content_index": index, "audio_end_ms": end}
                self._outbox.post({"type": "conversation.item.truncated", **told})
            case events.CreateResponse(response=params):
                await self._respond(params)
            case events.CancelResponse(response_id=id):
                if not self._active or id not in (None, self._active.response.id):
                    raise ApiError(400, "There is no such response to cancel.", code="response_cancel_not_active")
                await self._break_off("client_cancelled")

    def _update(self, changes: dict[str, Any]) -> None:
        before = self._config.audio.input
        self._config = self._config.updated(changes, self._serving.max_text_characters)
        if self._config.audio.input.format != before.format:
            self._end_of_stream()
        self._adjust_activity()
        self._outbox.post({"type": "session.updated", "session": self._config.told()})

    def _adjust_activity(self, *, anew: bool = False) -> None:
        detection = self._config.audio.input.turn_detection
        if detection is None:
            self._activity = None
        elif self._activity is None or anew:
            self._activity = VoiceActivity(detection, round(self._longest * RATE), self._buffer.end)
        else:
            self._activity.adjust(detection)

    async def _append(self, data: bytes) -> None:
        format = self._config.audio.input.format
        if self._activity is None and self._buffer.seconds + seconds_of(len(data), format) > self._longest:
            raise ApiError(
                400,
                f"audio: more than {self._longest:g} s in the buffer; commit or clear it",
                code="input_audio_buffer_full",
                param="audio",
            )
        # A second at a time, so that a long message holds nobody else up.
        step = rate_of(format) * 2
        for start in range(0, len(data), step):
            wave = self._incoming.push(data[start : start + step])
            self._buffer.push(wave)
            if self._activity:
                for found in self._activity.push(wave):
                    await self._detected(found)
                if not self._activity.speaking:
                    self._buffer.trim(self._activity.padding)
            await asyncio.sleep(0)

    async def _detected(self, found: Started | Stopped) -> None:
        detection = self._config.audio.input.turn_detection
        assert detection is not None
        if isinstance(found, Started):
            self._turn = new_id("item")
            self._quiet_from = None
            told = {"audio_start_ms": milliseconds(found.at), "item_id": self._turn}
            self._outbox.post({"type": "input_audio_buffer.speech_started", **told})
            self._buffer.take(self._buffer.start, found.at)
            if detection.interrupt_response and self._active and self._active.response.form.conversation:
                await self._break_off("turn_detected")
            return
        told = {"audio_end_ms": milliseconds(found.at), "item_id": self._turn}
        self._outbox.post({"type": "input_audio_buffer.speech_stopped", **told})
        self._commit(self._turn, self._buffer.take(self._buffer.start, found.at), answered=detection.create_response)
        if detection.create_response:
            await self._respond(None)

    def _end_of_stream(self) -> None:
        """What the resampler still holds belongs to what came before."""
        wave = self._incoming.push(b"", last=True)
        self._buffer.push(wave)
        self._incoming = Incoming(self._config.audio.input.format)

    def _commit_all(self) -> None:
        self._end_of_stream()
        if self._buffer.seconds < _LEAST_SECONDS:
            raise ApiError(
                400,
                f"The buffer has {self._buffer.seconds * 1000:.0f} ms of sound; a turn has at least 100.",
                code="input_audio_buffer_commit_empty",
            )
        id = self._turn if self._activity and self._activity.speaking else new_id("item")
        self._commit(id, self._buffer.take(self._buffer.start, self._buffer.end), answered=False)
        self._adjust_activity(anew=True)

    def _commit(self, id: str, wave: "np.ndarray", *, answered: bool) -> None:
        item = Item(id, "user", [self._recording(wave)])
        self._committed(item)
        self._hear(item, {0: wave})
        if self._config.audio.input.transcription and not answered:
            self._start(self._write_down(item))

    def _committed(self, item: Item) -> None:
        told = {"item_id": item.id, "previous_item_id": self._conversation.last_id}
        self._outbox.post({"type": "input_audio_buffer.committed", **told})
        self._add(item)

    def _create(self, message: events.Message, after: str | None) -> None:
        if message.type == "item_reference":
            raise ApiError(400, "item.type: only the input of a response refers", code="invalid_value", param="item")
        item, waves = self._read(message, "item")
        self._add(item, after)
        self._hear(item, waves)

    def _add(self, item: Item, after: str | None = None) -> None:
        previous, deleted = self._conversation.add(item, after)
        for kind in ("added", "done"):
            told = {"previous_item_id": previous, "item": item.told()}
            self._outbox.post({"type": f"conversation.item.{kind}", **told})
        self._tell_deleted(deleted)

    def _tell_deleted(self, ids: list[str]) -> None:
        for id in ids:
            self._forget_hearing(id)
            self._outbox.post({"type": "conversation.item.deleted", "item_id": id})

    def _read(self, message: events.Message, param: str) -> "tuple[Item, dict[int, np.ndarray]]":
        """The item, and the sound of those of its parts that are to be heard."""
        parts: list[Part] = []
        waves: dict[int, np.ndarray] = {}
        for place, content in enumerate(message.content):
            words = content.transcript if content.text is None else content.text
            if len(words or "") > self._serving.max_text_characters:
                raise ApiError(
                    400,
                    f"{param}.content.{place}: at most {self._serving.max_text_characters} characters are taken",
                    code="string_above_max_length",
                    param=f"{param}.content.{place}",
                )
            if content.type == "input_audio":
                where = f"{param}.content.{place}.audio"
                data = decode_base64(content.audio or "", where)
                format = self._config.audio.input.format
                if seconds_of(len(data), format) > self._longest:
                    raise ApiError(400, f"{where}: above {self._longest:g} s", code="audio_too_long", param=where)
                waves[place] = Incoming(format).push(data, last=True)
                part = self._recording(waves[place])
                part.text = content.transcript
                parts.append(part)
            elif message.role == "assistant":
                parts.append(Part("output_audio" if content.transcript is not None else "output_text", text=words))
            else:
                parts.append(Part("input_text", text=words))
        role: Role = message.role or "user"
        return Item(message.id or new_id("item"), role, parts), waves

    def _recording(self, wave: "np.ndarray") -> Part:
        """A part that says nothing yet, its sound as the client would send it."""
        from speechgpt.speech.audio import encode

        format = self._config.audio.input.format
        audio = from_pcm16(encode(wave, "pcm16", rate_of(format)), format)
        return Part("input_audio", audio=audio, seconds=len(wave) / RATE)

    # Hearing.

    def _hear(self, item: Item, waves: "dict[int, np.ndarray]") -> None:
        if waves:
            self._hearing[item.id] = self._start(self._heard(item, waves))

    async def _heard(self, item: Item, waves: "dict[int, np.ndarray]") -> ApiError | None:
        """Makes units of an item's sound. Returns why it cannot."""
        from speechgpt.speech.audio import encode

        try:
            for place, wave in waves.items():
                item.parts[place].heard = await self._service.hear(encode(wave, "wav"), "audio")
        except ApiError as error:
            return error
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("a turn could not be heard: %s", described(error))
            return ApiError(500, "The server failed to hear this; its log has the reason.", code="internal_error")
        self._hearing.pop(item.id, None)
        return None

    def _forget_hearing(self, id: str) -> None:
        if task := self._hearing.pop(id, None):
            task.cancel()

    async def _understood(self, items: list[Item]) -> None:
        """Returns when all that is needed of the items is in units or words. Raises ApiError for a question that
        cannot be heard."""
        tasks = {item.id: self._hearing[item.id] for item in items if item.id in self._hearing}
        if tasks:
            await asyncio.wait(tasks.values())
        last = next((item for item in reversed(items) if item.role != "system"), None)
        if last and last.id in tasks and not tasks[last.id].cancelled() and (error := tasks[last.id].result()):
            raise error
        for part in unwritten(items):
            assert part.heard is not None
            part.text = await self._service.write_down(part.heard, "input")

    async def _write_down(self, item: Item) -> None:
        """The transcription that a session has asked for, of a turn that no response has written down."""
        where = {"item_id": item.id, "content_index": 0}
        try:
            if (task := self._hearing.get(item.id)) and (error := await asyncio.shield(task)):
                raise error
            part = item.parts[0]
            if part.heard is None:
                return
            if part.text is None:
                part.text = (await self._service.dictate(part.heard, "audio")).text or ""
            self._transcribed(item)
        except ApiError as error:
            told = {"error": {**error.body()["error"]}}
            self._outbox.post({"type": "conversation.item.input_audio_transcription.failed", **where, **told})

    def _transcribed(self, item: Item) -> None:
        part = item.parts[0]
        told = {"transcript": part.text or "", "usage": {"type": "duration", "seconds": round(part.seconds, 3)}}
        self._outbox.post(
            {
                "type": "conversation.item.input_audio_transcription.completed",
                "item_id": item.id,
                "content_index": 0,
                **told,
            }
        )

    # Answering.

    async def _respond(self, params: events.ResponseParams | None, say: str | None = None) -> None:
        """Begin a response. say: words of the service's own; without them the conversation is answered."""
        if self._leaving:
            raise ApiError(503, "This part of the service is being replaced; connect again.", code="going_away")
        if self._active:
            raise ApiError(
                400,
                "The conversation has a response already; cancel it, or wait for its response.done.",
                code="conversation_already_has_active_response",
            )
        params = params or events.ResponseParams()
        form = self._form(params)
        items, waves = self._asked(params)
        response = Response(form, lambda: self._conversation.last_id)
        self._quiet_from = None
        for event in response.begin():
            self._outbox.post(event)
        for item in items:
            self._hear(item, waves.get(item.id, {}))
        active = self._active = Active(response, None if say else _recording_asked(items), say)
        active.task = self._start(self._answer(active, items))
        # A task that is cancelled before it has begun would end without a word.
        await asyncio.sleep(0)

    def _form(self, params: events.ResponseParams) -> Form:
        output = params.audio.output if params.audio else None
        settings = self._config.audio.output
        voice = (output.voice if output else None) or settings.voice
        check_voice(voice, "response.audio.output.voice")
        return Form(
            modality=(params.output_modalities or self._config.output_modalities)[0],
            format=(output.format if output else None) or settings.format,
            voice=voice,
            max_output_tokens=params.max_output_tokens or self._config.max_output_tokens,
            conversation=None if params.conversation == "none" else self._conversation_id,
            metadata=params.metadata,
        )

    def _asked(self, params: events.ResponseParams) -> "tuple[list[Item], dict[str, dict[int, np.ndarray]]]":
        """The items that are to be answered, and the sound of those that nobody has heard yet."""
        if params.input is None:
            return self._conversation.history(), {}
        items: list[Item] = []
        waves: dict[str, dict[int, np.ndarray]] = {}
        for place, message in enumerate(params.input):
            if message.type == "item_reference":
                items.append(self._conversation.find(message.id or "", f"response.input.{place}.id"))
                continue
            item, sounds = self._read(message, f"response.input.{place}")
            # Not one of the conversation's, whatever it is called.
            item.id = new_id("item")
            items.append(item)
            waves[item.id] = sounds
        return items, waves

    async def _break_off(self, reason: Reason) -> None:
        """Returns when the response under way, if any, has ended."""
        active = self._active
        if active is None or active.task is None:
            return
        if active.reason is None and not active.ended:
            active.reason = reason
            active.task.cancel()
        await asyncio.wait({active.task})

    async def _answer(self, active: Active, items: list[Item]) -> None:
        response, say, began = active.response, active.say, time.monotonic()
        reply: Reply | None = None
        own = set(self._hearing) - {item.id for item in self._conversation.items}
        try:
            async with asyncio.timeout(self._serving.request_timeout_seconds):
                pieces = await self._pieces(response.form, items, say)
                async with aclosing(pieces):
                    if say is not None:
                        self._told(active, response.words(say))
                    async for piece in pieces:
                        match piece:
                            case Words("transcript", text):
                                self._understands(active, text)
                            case Words("text", text):
                                self._told(active, response.words(text))
                            case Sound(data):
                                if not response.seconds:
                                    self._meters.first_audio(time.monotonic() - began)
                                self._told(active, response.sound(from_pcm16(data, response.form.format)))
                            case Reply():
                                reply = piece
                        await self._outbox.room()
            if reply is None:
                raise RuntimeError("an answer ended without being whole")
            active.ended = True
            self._told(active, response.whole(reply))
            self._remember(response, reply)
        except asyncio.CancelledError:
            if active.reason is None:
                self._meters.ended("cancelled", "disconnected", response.seconds)
                raise
            if task := asyncio.current_task():
                task.uncancel()
            self._told(active, response.cancelled(active.reason))
        except ApiError as error:
            self._told(active, response.failed(error))
        except TimeoutError:
            self._told(active, response.failed(deadline_passed(self._serving.request_timeout_seconds)))
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("a response failed: %s", described(error))
            told = ApiError(500, "The server failed to answer; its log has the reason.", code="internal_error")
            self._told(active, response.failed(told))
        finally:
            active.ended = True
            self._active = None
            for id in own:
                self._forget_hearing(id)
            self._wake.set()
        # Nothing has waited since the end was told, so that nobody can come between.
        self._after(active)

    async def _pieces(self, form: Form, items: list[Item], say: str | None) -> AsyncGenerator[LivePiece, None]:
        rate = rate_of(form.format)
        manner = Manner("pcm16", rate, self._config.audio.output.speed) if form.modality == "audio" else None
        if say is not None:
            return await self._service.say_live(say, manner) if manner else _said(say)
        await self._understood(items)
        most = None if form.max_output_tokens == "inf" else form.max_output_tokens
        forgetful = self._config.truncation == "auto"
        return await self._service.answer_live(dialogue(items), manner, most, forgetful=forgetful)

    def _understands(self, active: Active, text: str) -> None:
        """More of the question, as the model writes it down before it answers."""
        active.transcript += text
        if active.asked and active.asked.parts[0].text is None and self._config.audio.input.transcription:
            kind = "conversation.item.input_audio_transcription.delta"
            self._outbox.post({"type": kind, "item_id": active.asked.id, "content_index": 0, "delta": text})

    def _told(self, active: Active, news: list[dict[str, Any]]) -> None:
        response = active.response
        for event in news:
            if event["type"] == "conversation.item.added" and response.item:
                _, deleted = self._conversation.add(response.item)
                self._outbox.post(event)
                self._tell_deleted(deleted)
            else:
                self._outbox.post(event)

    def _remember(self, response: Response, reply: Reply) -> None:
        self._conversation.forget(reply.forgotten)
        if response.item and response.seconds and reply.finish == "stop":
            self._pace = max(1.0, len(response.item.parts[0].text or "") / response.seconds)

    def _after(self, active: Active) -> None:
        response, item, asked = active.response, active.response.item, active.asked
        if item and response.status != "completed" and response.form.modality == "audio":
            # What was not made into sound, nobody has heard.
            part = item.parts[0]
            part.text = heard_words(part.text or "", response.seconds * self._pace / max(1, len(part.text or "")))
        if response.form.conversation and active.say is None:
            self._last = time.monotonic()
            self._quiet_from = self._last + response.seconds
        self._meters.ended(response.status, active.reason, response.seconds)
        if asked is None:
            return
        # The transcript is whole once the answer has begun.
        if item and active.transcript and asked.parts[0].text is None:
            asked.parts[0].text = active.transcript
            if self._config.audio.input.transcription:
                self._transcribed(asked)
        elif asked.parts[0].text is None and self._config.audio.input.transcription:
            self._start(self._write_down(asked))

    def _fault(self, error: ApiError, event_id: str | None) -> None:
        body = {**error.body()["error"], "event_id": event_id}
        self._outbox.post({"type": "error", "error": body})

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _recording_asked(items: list[Item]) -> Item | None:
    """The item whose one recording is the question."""
    questions: list[Item] = []
    for item in items:
        if item.role == "assistant":
            questions = []
        elif item.role == "user":
            questions.append(item)
    if len(questions) == 1 and [part.type for part in questions[0].parts] == ["input_audio"]:
        return questions[0]
    return None


async def _said(text: str) -> AsyncGenerator[LivePiece, None]:
    """Words that no model has to make."""
    yield Reply(None, text, [], True, "stop", 0, 0, 0, 0)


async def _awaited(what: Awaitable[Any]) -> Any:
    return await what
