"""Messages become the dialogue that the model is asked."""

import asyncio
import base64
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import TypeAdapter

from serve.dialogue import understand
from serve.encoder import Heard
from serve.errors import ApiError
from serve.memory import Exchange
from serve.wire import Message
from speechgpt.language.prompts import Turn


@dataclass
class Ears:
    """Hears the bytes of a clip as its units, writes units down as numbers, and counts what it was asked."""

    remembered: dict[str, Exchange] = field(default_factory=dict)
    written: list[tuple[int, ...]] = field(default_factory=list)

    async def hear(self, clip: bytes, param: str) -> Heard:
        return Heard(tuple(clip), len(clip) / 50)

    async def write_down(self, heard: Heard, param: str) -> str:
        self.written.append(heard.units)
        return " ".join(map(str, heard.units))

    async def recall(self, audio_id: str) -> Exchange | None:
        return self.remembered.get(audio_id)


def recording(*units: int) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(bytes(units)).decode(), "format": "wav"}}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def turns(messages: list[dict[str, Any]], ears: Ears | None = None) -> list[Turn]:
    parsed = TypeAdapter(list[Message]).validate_python(messages)
    return asyncio.run(understand(parsed, ears or Ears(), 1000, max_seconds=1.0))


def test_a_recording_alone_stays_in_units() -> None:
    assert turns([user(recording(1, 2))]) == [Turn("user", units=(1, 2))]


def test_text_is_text() -> None:
    assert turns([{"role": "user", "content": " hello "}]) == [Turn("user", text="hello")]


def test_a_mixture_is_written_down_in_its_order() -> None:
    parts = [{"type": "text", "text": "after"}, recording(1, 2), {"type": "text", "text": "comes"}, recording(3)]
    assert turns([user(*parts)]) == [Turn("user", text="after 1 2 comes 3")]


def test_a_spoken_answer_brings_its_question_with_it() -> None:
    ears = Ears({"audio_1": Exchange("two plus three", "five")})
    history = [user(recording(1, 2)), {"role": "assistant", "audio": {"id": "audio_1"}}, user(recording(3))]
    expected = [Turn("user", text="two plus three"), Turn("assistant", text="five"), Turn("user", units=(3,))]
    assert turns(history, ears) == expected
    assert ears.written == []


def test_history_without_memory_is_written_down() -> None:
    ears = Ears()
    history = [user(recording(1, 2)), {"role": "assistant", "content": "five"}, user(recording(3))]
    assert turns(history, ears)[0] == Turn("user", text="1 2")
    assert ears.written == [(1, 2)]


def test_whole_reply_messages_may_be_sent_back() -> None:
    sent_back = {"role": "assistant", "content": "five", "refusal": None, "annotations": [], "audio": None}
    assert turns([{"role": "user", "content": "a"}, sent_back, {"role": "user", "content": "b"}])[1].text == "five"


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        ({"role": "assistant", "audio": {"id": "audio_gone"}}, 404, "audio_not_found"),
        ({"role": "assistant", "content": None}, 400, "empty_content"),
        ({"role": "user", "content": "again"}, 400, "invalid_value"),
    ],
)
def test_history_that_cannot_be_used(message: dict[str, Any], status: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        turns([{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}])
    assert (caught.value.status, caught.value.code) == (status, code)
    assert str(caught.value.param).startswith("messages.1")


def test_instructions_are_no_turns_and_keep_their_places() -> None:
    orders = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
    ]
    said = [user(recording(1)), {"role": "assistant", "content": "one"}, {"role": "user", "content": "and two"}]
    expected = [Turn("user", text="1"), Turn("assistant", text="one"), Turn("user", text="and two")]
    assert turns([*orders, *said]) == turns([said[0], orders[1], *said[1:]]) == expected
    with pytest.raises(ApiError) as refused:
        turns([*orders, said[0], said[0]])
    assert refused.value.param == "messages.3.role"
    with pytest.raises(ApiError) as refused:
        turns([{"role": "system", "content": "a" * 1001}, said[0]])
    assert refused.value.code == "string_above_max_length"


class Slow(Ears):
    """Takes its time, and notes who is heard or written down at the same time, and who is given up."""

    together, most, given_up = 0, 0, 0

    async def hear(self, clip: bytes, param: str) -> Heard:
        await self._work(0.01 if clip[0] else 60)
        return await super().hear(clip, param)

    async def write_down(self, heard: Heard, param: str) -> str:
        await self._work(0.01)
        return await super().write_down(heard, param)

    async def _work(self, seconds: float) -> None:
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.together -= 1


def test_sound_of_one_request_is_limited_and_heard_a_few_clips_at_a_time() -> None:
    """Row 6: one body can hold hundreds of compressed clips."""
    ears = Slow()
    assert turns([user(*[recording(1, 2)] * 24)], ears)[0].text
    assert 1 < ears.most <= 4
    ears = Slow()
    answered = [user(recording(1, 2)), {"role": "assistant", "content": "one"}]
    assert turns([*answered * 12, user(recording(1))], ears)[0].text == "1 2"
    assert 1 < ears.most <= 4 and len(ears.written) == 12
    ears = Slow()
    with pytest.raises(ApiError) as refused:
        turns([user(recording(0), *[recording(1, 2)] * 500)], ears)
    assert (refused.value.status, refused.value.code) == (400, "audio_too_long")
    assert ears.given_up and ears.together == 0
