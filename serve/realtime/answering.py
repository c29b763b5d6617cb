"""Answers to a conversation: at most one is made at a time, and it can be broken off."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.errors import ApiError, deadline_passed, described
from serve.prompting import Reply, Words
from serve.realtime import client_events as events
from serve.realtime.conversation import Item, dialogue, heard_words
from serve.realtime.response import Form, Reason, Response, new_id
from serve.realtime.sound import from_pcm16, rate_of
from serve.realtime.talk import Talk, going_away
from serve.service import LivePiece, check_voice
from serve.voice import Manner, Sound

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("ray.serve")
_CHARACTERS_A_SECOND = 15.0
"""Pace of speech, until the session has heard the model's own."""


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


class Answers:
    """Of one session. active: the response under way."""

    def __init__(self, talk: Talk) -> None:
        self.active: Active | None = None
        self._talk = talk
        self._pace = _CHARACTERS_A_SECOND

    async def begin(self, params: events.ResponseParams | None, say: str | None = None) -> None:
        """Begin a response. say: words of the service's own; without them the conversation is answered."""
        if self._talk.leaving and not self._talk.last_turn:
            raise going_away()
        if self.active:
            raise ApiError(
                400,
                "The conversation has a response already; cancel it, or wait for its response.done.",
                code="conversation_already_has_active_response",
            )
        self._talk.last_turn = False
        params = params or events.ResponseParams()
        form = self._form(params)
        items, waves = self._asked(params)
        response = Response(form, lambda: self._talk.conversation.last_id)
        self._talk.quiet_from = None
        for event in response.begin():
            self._talk.outbox.post(event)
        for item in items:
            self._talk.hearing.begin(item, waves.get(item.id, {}))
        active = self.active = Active(response, None if say else _recording_asked(items), say)
        active.task = self._talk.start(self._answer(active, items))
        # A task that is cancelled before it has begun would end without a word.
        await asyncio.sleep(0)

    async def break_off(self, reason: Reason) -> None:
        """Returns when the response under way, if any, has ended."""
        active = self.active
        if active is None or active.task is None:
            return
        if active.reason is None and not active.ended:
            active.reason = reason
            active.task.cancel()
        await asyncio.wait({active.task})

    def _form(self, params: events.ResponseParams) -> Form:
        output = params.audio.output if params.audio else None
        settings = self._talk.config.audio.output
        voice = (output.voice if output else None) or settings.voice
        check_voice(voice, "response.audio.output.voice")
        return Form(
            modality=(params.output_modalities or self._talk.config.output_modalities)[0],
            format=(output.format if output else None) or settings.format,
            voice=voice,
            max_output_tokens=params.max_output_tokens or self._talk.config.max_output_tokens,
            conversation=None if params.conversation == "none" else self._talk.conversation_id,
            metadata=params.metadata,
        )

    def _asked(self, params: events.ResponseParams) -> "tuple[list[Item], dict[str, dict[int, np.ndarray]]]":
        """The items that are to be answered, and the sound of those that nobody has heard yet."""
        if params.input is None:
            return self._talk.conversation.history(), {}
        items: list[Item] = []
        waves: dict[str, dict[int, np.ndarray]] = {}
        for place, message in enumerate(params.input):
            if message.type == "item_reference":
                items.append(self._talk.conversation.find(message.id or "", f"response.input.{place}.id"))
                continue
            item, sounds = self._talk.read(message, f"response.input.{place}")
            # Not one of the conversation's, whatever it is called.
            item.id = new_id("item")
            items.append(item)
            waves[item.id] = sounds
        return items, waves

    async def _answer(self, active: Active, items: list[Item]) -> None:
        response, say = active.response, active.say
        reply: Reply | None = None
        own = self._talk.hearing.items - {item.id for item in self._talk.conversation.items}
        try:
            async with asyncio.timeout(self._talk.serving.request_timeout_seconds):
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
                                self._told(active, response.sound(from_pcm16(data, response.form.format)))
                            case Reply():
                                reply = piece
                        await self._talk.outbox.room()
            if reply is None:
                raise RuntimeError("an answer ended without being whole")
            active.ended = True
            self._told(active, response.whole(reply))
            self._remember(response, reply)
        except asyncio.CancelledError:
            if active.reason is None:
                self._talk.meters.response("cancelled", "disconnected")
                raise
            if task := asyncio.current_task():
                task.uncancel()
            self._told(active, response.cancelled(active.reason))
        except ApiError as error:
            self._told(active, response.failed(error))
        except TimeoutError:
            self._told(active, response.failed(deadline_passed(self._talk.serving.request_timeout_seconds)))
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("a response failed: %s", described(error))
            told = ApiError(500, "The server failed to answer; its log has the reason.", code="internal_error")
            self._told(active, response.failed(told))
        finally:
            active.ended = True
            self.active = None
            for id in own:
                self._talk.hearing.forget(id)
            self._talk.wake.set()
        # Nothing has waited since the end was told, so that nobody can come between.
        self._after(active)

    async def _pieces(self, form: Form, items: list[Item], say: str | None) -> AsyncGenerator[LivePiece, None]:
        rate = rate_of(form.format)
        manner = Manner("pcm16", rate, self._talk.config.audio.output.speed) if form.modality == "audio" else None
        if say is not None:
            return await self._talk.service.say_live(say, manner) if manner else _said(say)
        await self._talk.hearing.understood(items)
        most = None if form.max_output_tokens == "inf" else form.max_output_tokens
        forgetful = self._talk.config.truncation == "auto"
        return await self._talk.service.answer_live(dialogue(items), manner, most, forgetful=forgetful)

    def _understands(self, active: Active, text: str) -> None:
        """More of the question, as the model writes it down before it answers."""
        active.transcript += text
        if active.asked and active.asked.parts[0].text is None and self._talk.config.audio.input.transcription:
            self._talk.hearing.being_transcribed(active.asked, text)

    def _told(self, active: Active, news: list[dict[str, Any]]) -> None:
        response = active.response
        for event in news:
            if event["type"] == "conversation.item.added" and response.item:
                _, deleted = self._talk.conversation.add(response.item)
                self._talk.outbox.post(event)
                self._talk.tell_deleted(deleted)
            else:
                self._talk.outbox.post(event)

    def _remember(self, response: Response, reply: Reply) -> None:
        self._talk.conversation.forget(reply.forgotten)
        if response.item and response.seconds and reply.finish == "stop":
            self._pace = max(1.0, len(response.item.parts[0].text or "") / response.seconds)

    def _after(self, active: Active) -> None:
        response, item, asked = active.response, active.response.item, active.asked
        if item and response.status != "completed" and response.form.modality == "audio":
            # What was not made into sound, nobody has heard.
            part = item.parts[0]
            part.text = heard_words(part.text or "", response.seconds * self._pace / max(1, len(part.text or "")))
        if response.form.conversation and active.say is None:
            self._talk.last = time.monotonic()
            self._talk.quiet_from = self._talk.last + response.seconds
        self._talk.meters.response(response.status, active.reason)
        if asked is None:
            return
        # The transcript is whole once the answer has begun.
        if item and active.transcript and asked.parts[0].text is None:
            asked.parts[0].text = active.transcript
            if self._talk.config.audio.input.transcription:
                self._talk.hearing.transcribed(asked)
        elif asked.parts[0].text is None and self._talk.config.audio.input.transcription:
            self._talk.hearing.write_down(asked)


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
