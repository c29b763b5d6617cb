"""What a user says into a session: turns that are found in the sound, or that the client commits."""

import asyncio
from typing import TYPE_CHECKING

from serve.realtime.answering import Answers
from serve.realtime.conversation import Item, Part
from serve.realtime.input_sound import InputSound
from serve.realtime.messages import recording
from serve.realtime.response import new_id
from serve.realtime.sound import milliseconds, rate_of
from serve.realtime.talk import Talk
from serve.realtime.turn_detection import Started, Stopped

if TYPE_CHECKING:
    import numpy as np


class Turns:
    """Of one session. Each is committed to its conversation, and answered where the session is set so."""

    def __init__(self, talk: Talk, answers: Answers) -> None:
        self._talk = talk
        self._answers = answers
        self._sound = InputSound(talk.config.audio.input, talk.longest)
        self._turn = ""
        """Id of the item that the turn being spoken will be."""

    @property
    def speaking(self) -> bool:
        return self._sound.speaking

    def adjust(self) -> None:
        """The session is set otherwise."""
        self._sound.adjust(self._talk.config.audio.input)

    async def append(self, data: bytes) -> None:
        """More sound. Raises ApiError where it is too much."""
        self._sound.check_room(len(data))
        # A second at a time, so that a long message holds nobody else up.
        step = rate_of(self._talk.config.audio.input.format) * 2
        for start in range(0, len(data), step):
            for found in self._sound.push(data[start : start + step]):
                await self._detected(found)
            await asyncio.sleep(0)

    def commit(self) -> None:
        """What is here is a turn. Raises ApiError where it is too little."""
        id = self._turn if self._sound.speaking else new_id("item")
        self._commit(id, self._sound.take_turn(), answered=False)

    def clear(self) -> None:
        self._sound.clear()
        self._talk.outbox.post({"type": "input_audio_buffer.cleared"})

    async def prompt_idle(self) -> None:
        """Nobody has said anything: the service asks whether somebody is there."""
        start, end = self._sound.bounds
        self._sound.drop()
        item = Item(new_id("item"), "user", [Part("input_audio", text="")])
        times = {"audio_start_ms": milliseconds(start), "audio_end_ms": milliseconds(end)}
        self._talk.outbox.post({"type": "input_audio_buffer.timeout_triggered", "item_id": item.id, **times})
        self._committed(item)
        await self._answers.begin(None, say=self._talk.serving.realtime.idle_prompt)

    async def _detected(self, found: Started | Stopped) -> None:
        detection = self._talk.config.audio.input.turn_detection
        assert detection is not None
        if isinstance(found, Started):
            self._turn = new_id("item")
            self._talk.quiet_from = None
            told = {"audio_start_ms": milliseconds(found.at), "item_id": self._turn}
            self._talk.outbox.post({"type": "input_audio_buffer.speech_started", **told})
            self._sound.take(found.at)
            active = self._answers.active
            if detection.interrupt_response and active and active.response.form.conversation:
                await self._answers.break_off("turn_detected")
            return
        told = {"audio_end_ms": milliseconds(found.at), "item_id": self._turn}
        self._talk.outbox.post({"type": "input_audio_buffer.speech_stopped", **told})
        self._commit(self._turn, self._sound.take(found.at), answered=detection.create_response)
        if detection.create_response:
            await self._answers.begin(None)

    def _commit(self, id: str, wave: "np.ndarray", *, answered: bool) -> None:
        item = Item(id, "user", [recording(wave, self._talk.config.audio.input.format)])
        self._committed(item)
        self._talk.hearing.begin(item, {0: wave})
        if self._talk.config.audio.input.transcription and not answered:
            self._talk.hearing.write_down(item)

    def _committed(self, item: Item) -> None:
        told = {"item_id": item.id, "previous_item_id": self._talk.conversation.last_id}
        self._talk.outbox.post({"type": "input_audio_buffer.committed", **told})
        self._talk.add(item)
