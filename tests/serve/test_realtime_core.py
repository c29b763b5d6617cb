"""The core of realtime sessions: hearing turns, reading events, and what is remembered; no sockets, no models."""

import json
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.encoder import Heard
from serve.errors import ApiError
from serve.realtime.client_events import Malformed, parse
from serve.realtime.conversation import Conversation, Item, Part, dialogue, heard_words, unwritten
from serve.realtime.input_buffer import InputBuffer
from serve.realtime.session_config import ALaw, AudioFormat, MuLaw, Pcm, ServerVad, SessionConfig
from serve.realtime.sound import RATE, Incoming, from_pcm16, to_wave
from serve.realtime.turn_detection import Started, Stopped, VoiceActivity

PCM, ULAW, ALAW = Pcm(type="audio/pcm"), MuLaw(type="audio/pcmu"), ALaw(type="audio/pcma")
LONGEST = 30 * RATE


def voice(seconds: float) -> np.ndarray:
    """float32 [samples] at 16 kHz: a gliding tone in syllables."""
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.4 * np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * (220 + 100 * time) * time)).astype(np.float32)


def noise(seconds: float, level: float = 0.003) -> np.ndarray:
    return np.random.default_rng(0).normal(0, level, int(seconds * RATE)).astype(np.float32)


def vad(**settings: object) -> ServerVad:
    return ServerVad.model_validate({"type": "server_vad", **settings})


def turns(wave: np.ndarray, settings: ServerVad, longest: int = LONGEST) -> list[Started | Stopped]:
    return VoiceActivity(settings, longest).push(wave)


def cut(data: bytes | np.ndarray, places: list[int]) -> list:  # type: ignore[type-arg]
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(bounds)]


# Turns.


def test_a_turn_has_its_padding_and_its_silence() -> None:
    wave = np.concatenate([noise(1), voice(1.5) + noise(1.5), noise(1.5)])
    [started, stopped] = turns(wave, vad(prefix_padding_ms=200, silence_duration_ms=400))
    assert isinstance(started, Started) and isinstance(stopped, Stopped)
    assert 0.75 * RATE <= started.at <= 0.95 * RATE
    assert 2.8 * RATE <= stopped.at <= 3.0 * RATE


def test_two_turns_do_not_overlap() -> None:
    wave = np.concatenate([noise(1), voice(1), noise(0.7), voice(1), noise(1)])
    found = turns(wave, vad(prefix_padding_ms=2000, silence_duration_ms=300))
    assert [type(event) for event in found] == [Started, Stopped] * 2
    assert all(before.at <= after.at for before, after in pairwise(found))


def test_a_longer_patience_makes_one_turn_of_two() -> None:
    wave = np.concatenate([noise(1), voice(1), noise(0.7), voice(1), noise(2)])
    assert len(turns(wave, vad(silence_duration_ms=1200))) == 2
    assert len(turns(wave, vad(silence_duration_ms=300))) == 4


@pytest.mark.parametrize("level", [0.0, 0.001, 0.01, 0.1])
def test_noise_is_nobody(level: float) -> None:
    assert turns(noise(20, level), vad()) == []


def test_hum_is_nobody() -> None:
    time = np.arange(5 * RATE) / RATE
    assert turns((0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), vad()) == []


def test_a_click_is_nobody() -> None:
    wave = noise(2)
    wave[RATE : RATE + 80] = 0.9
    assert turns(wave, vad()) == []


def test_a_higher_threshold_asks_for_a_louder_voice() -> None:
    soft = np.concatenate([noise(1), 0.06 * voice(1.5) + noise(1.5), noise(1)])
    assert turns(soft, vad(threshold=0.2)) and not turns(soft, vad(threshold=0.95))


def test_recorded_speech_in_a_room_is_heard() -> None:
    from speechgpt.speech.audio import decode

    heard = 0
    clips = sorted(Path(str(resources.files("speechgpt").joinpath("recordings"))).glob("*.opus"))[:20]
    for clip in clips:
        wave = decode(clip)
        found = turns(np.concatenate([noise(1), wave + noise(len(wave) / RATE + 1)[: len(wave)], noise(1)]), vad())
        heard += isinstance(found[0], Started) and abs(found[0].at - 0.7 * RATE) < 0.5 * RATE
    assert heard == len(clips) > 0


def test_a_turn_without_end_is_ended() -> None:
    wave = np.concatenate([noise(1), voice(9)])
    found = turns(wave, vad(), longest=3 * RATE)
    stops = [event for event in found if isinstance(event, Stopped)]
    assert len(stops) >= 2
    for started, stopped in zip(found[::2], stops, strict=False):
        assert stopped.at - started.at <= 3 * RATE


@given(st.lists(st.integers(0, 1 << 20), max_size=12))
def test_turns_do_not_depend_on_how_the_sound_comes(places: list[int]) -> None:
    wave = np.concatenate([noise(0.6), voice(0.8), noise(0.8), voice(0.5), noise(0.7)])
    activity = VoiceActivity(vad(), LONGEST)
    found = [event for piece in cut(wave, places) for event in activity.push(piece)]
    assert found == turns(wave, vad()) and len(found) == 4


# Sound.


@given(st.sampled_from([PCM, ULAW, ALAW]), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_chunks_are_the_sound_of_one_message(format: AudioFormat, places: list[int]) -> None:
    data = from_pcm16((voice(0.5) * 32767).astype("<i2").tobytes(), format)
    whole = Incoming(format).push(data, last=True)
    stream = Incoming(format)
    pieces = [stream.push(piece) for piece in cut(data, places)] + [stream.push(b"", last=True)]
    assert np.array_equal(np.concatenate(pieces), whole) and len(whole) > 1000


@pytest.mark.parametrize("format", [ULAW, ALAW])
def test_telephone_sound_comes_back(format: AudioFormat) -> None:
    wave = voice(0.5)
    back = to_wave(from_pcm16((wave * 32767).astype("<i2").tobytes(), format), format)
    assert np.abs(back - wave).max() < 0.02
    assert to_wave(b"", format).shape == (0,)


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 900)), max_size=20))
def test_the_buffer_keeps_places_in_the_stream(steps: list[tuple[int, int]]) -> None:
    stream = np.arange(sum(size for size, _ in steps), dtype=np.float32)
    buffer, at = InputBuffer(), 0
    for size, kept in steps:
        buffer.push(stream[at : at + size])
        at += size
        buffer.trim(kept)
        assert buffer.end == at and buffer.end - buffer.start <= max(kept, 0) + size
    start, middle = buffer.start, (buffer.start + buffer.end) // 2
    assert np.array_equal(buffer.take(start, middle), stream[start:middle])
    assert np.array_equal(buffer.take(middle, at), stream[middle:at]) and buffer.seconds == 0


# Events and settings.


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("[" * 100_000, "invalid_json", None),
        ("[]", "invalid_json", None),
        ("{}", "invalid_value", "type"),
        ({"type": "response.go"}, "invalid_value", "type"),
        ({"type": ["response.create"]}, "invalid_value", "type"),
        ({"type": "output_audio_buffer.clear"}, "unsupported_value", "type"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "", "more": 1}, "unknown_parameter", "more"),
        ({"type": "conversation.item.truncate", "item_id": "i", "content_index": 0, "audio_end_ms": -1}, *(
            "invalid_value", "audio_end_ms")),
        ({"type": "response.create", "response": {"tools": [{"type": "function"}]}}, *(
            "unsupported_parameter", "response.tools")),
        ({"type": "response.create", "response": {"output_modalities": ["text", "audio"]}}, *(
            "invalid_value", "response.output_modalities")),
        ({"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": "c"}}, *(
            "unsupported_value", "item.type")),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": []}}, *(
            "empty_content", "item.content")),
    ],
)  # fmt: skip
def test_malformed_events_are_named(message: object, code: str, param: str | None) -> None:
    text = message if isinstance(message, str) else json.dumps({**message, "event_id": "mine"})  # type: ignore[dict-item]
    with pytest.raises(Malformed) as caught:
        parse(text)
    assert (caught.value.error.code, caught.value.error.param) == (code, param)
    assert caught.value.event_id == (None if isinstance(message, str) else "mine")


NAMES = ["type", "event_id", "item", "audio", "session", "role", "content", "text", "response", "input"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["message", "user", "input_text", "", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
KINDS = ["session.update", "conversation.item.create", "response.create", "input_audio_buffer.append"]


@given(JSON, st.sampled_from(KINDS))
def test_whatever_comes_is_an_event_or_malformed(body: object, kind: str) -> None:
    for message in (body, {"type": kind, "item": body, "session": body, "response": body, "audio": body}):
        try:
            parse(json.dumps(message))
        except Malformed as malformed:
            assert malformed.error.status == 400 and malformed.error.message


def test_settings_change_one_by_one() -> None:
    config = SessionConfig(model="tiny")
    louder = config.updated({"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 0.8}}}}, 100)
    assert louder.audio.input.turn_detection == vad(threshold=0.8)
    longer = louder.updated({"audio": {"input": {"turn_detection": {"silence_duration_ms": 900}}}}, 100)
    assert longer.audio.input.turn_detection == vad(threshold=0.8, silence_duration_ms=900)
    off = longer.updated({"audio": {"input": {"turn_detection": None}, "output": {"voice": {"id": "marin"}}}}, 100)
    assert off.audio.input.turn_detection is None and off.audio.output.voice == "marin"
    phone = off.updated({"audio": {"input": {"format": {"type": "audio/pcmu"}}}, "instructions": "be kind"}, 100)
    assert phone.audio.input.format == ULAW and phone.told()["instructions"] == "be kind"
    assert phone.updated(phone.told(), 100) == phone


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"tools": [{"type": "function", "name": "f"}]}, "unsupported_parameter", "session.tools"),
        ({"tool_choice": "required"}, "unsupported_parameter", "session.tool_choice"),
        ({"temperature": 0.8}, "unknown_parameter", "session.temperature"),
        ({"type": "transcription"}, "invalid_value", "session.type"),
        ({"model": "gpt-realtime"}, "invalid_value", "session.model"),
        ({"instructions": "x" * 101}, "string_above_max_length", "session.instructions"),
        ({"audio": {"output": {"voice": "nobody"}}}, "voice_not_found", "session.audio.output.voice"),
        ({"audio": {"output": {"speed": 3}}}, "invalid_value", "session.audio.output.speed"),
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, *(
            "unsupported_value", "session.audio.input.format.type")),
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}, *(
            "unsupported_value", "session.audio.input.turn_detection")),
        ({"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}, *(
            "unsupported_parameter", "session.audio.input.noise_reduction")),
        ({"audio": {"input": {"transcription": {"language": "fr"}}}}, *(
            "unsupported_value", "session.audio.input.transcription.language")),
    ],
)  # fmt: skip
def test_what_a_session_cannot_be_is_named(changes: dict, code: str, param: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ApiError) as caught:
        SessionConfig(model="tiny").updated(changes, 100)
    assert (caught.value.code, caught.value.param) == (code, param)


# What is remembered.


def user(id: str, text: str) -> Item:
    return Item(id, "user", [Part("input_text", text)])


def spoken(id: str, text: str | None = None) -> Item:
    return Item(id, "user", [Part("input_audio", text, b"\0" * 96_000, 2.0, Heard((1, 2, 3), 2.0))])


def answer(id: str, text: str) -> Item:
    return Item(id, "assistant", [Part("output_audio", text, b"\0" * 480_000, 10.0)])


def filled(*items: Item, max_items: int = 100, max_seconds: float = 1000) -> Conversation:
    conversation = Conversation(max_items, max_seconds)
    for item in items:
        conversation.add(item)
    return conversation


def texts(items: list[Item]) -> list[str | None]:
    return [turn.text for turn in dialogue(items)]


def test_the_history_is_words_and_the_question_units() -> None:
    items = [user("a", "one"), answer("b", "two"), spoken("c", "three"), answer("d", "four"), spoken("e")]
    *past, last = dialogue(items)
    assert [turn.text for turn in past] == ["one", "two", "three", "four"]
    assert last.units == (1, 2, 3) and last.text is None and unwritten(items) == []


def test_what_does_not_alternate_is_joined_or_left_out() -> None:
    system = Item("s", "system", [Part("input_text", "be kind")])
    assert texts([answer("a", "hello"), user("b", "one"), system, user("c", "two")]) == ["one two"]
    assert texts([user("a", "one"), answer("b", ""), user("c", "two")]) == ["two"]
    mixed = [spoken("a"), user("b", "two")]
    assert [part is mixed[0].parts[0] for part in unwritten(mixed)] == [True]
    with pytest.raises(ApiError) as caught:
        dialogue([answer("a", "hello"), system])
    assert caught.value.code == "empty_conversation"


def test_forgotten_exchanges_are_left_out() -> None:
    conversation = filled(user("a", "one"), answer("b", "two"), user("c", "three"), answer("d", "four"))
    conversation.add(user("e", "five"))
    conversation.forget(1)
    assert texts(conversation.history()) == ["three", "four", "five"]
    conversation.forget(1)
    assert texts(conversation.history()) == ["five"] and conversation.find("a").parts[0].text == "one"


def test_what_was_not_heard_is_not_remembered() -> None:
    conversation = filled(user("a", "one"), answer("b", "two plus three is five"), user("c", "and"))
    conversation.truncate("b", 0, 5_000)
    assert texts(conversation.history()) == ["one", "two plus", "and"]
    part = conversation.find("b").parts[0]
    assert part.seconds == 5 and part.audio is not None and len(part.audio) == 240_000
    conversation.truncate("b", 0, 0)
    assert texts(conversation.history()) == ["and"]


@pytest.mark.parametrize(
    ("id", "index", "end", "param"),
    [("a", 0, 0, "item_id"), ("b", 1, 0, "content_index"), ("b", 0, 10_200, "audio_end_ms"), ("x", 0, 0, "item_id")],
)
def test_what_cannot_be_truncated_is_named(id: str, index: int, end: int, param: str) -> None:
    conversation = filled(user("a", "one"), answer("b", "two"))
    with pytest.raises(ApiError) as caught:
        conversation.truncate(id, index, end)
    assert caught.value.param == param and conversation.find("b").parts[0].text == "two"


@given(st.text(alphabet="ab ", max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_more_was_heard_the_later_it_was_cut(text: str, first: float, second: float) -> None:
    less, more = sorted((first, second))
    assert text.startswith(heard_words(text, less)) and heard_words(text, more).startswith(heard_words(text, less))
    assert heard_words(text, 1.0) == text


def test_items_go_where_they_are_put() -> None:
    conversation = filled(user("a", "one"), answer("b", "two"))
    assert conversation.add(user("c", "first"), "root") == (None, [])
    assert conversation.add(user("d", "after one"), "a") == ("a", [])
    assert [item.id for item in conversation.items] == ["c", "a", "d", "b"] and conversation.last_id == "b"
    for id, after in (("a", None), ("e", "nowhere")):
        with pytest.raises(ApiError):
            conversation.add(user(id, "again"), after)
    conversation.delete("a")
    with pytest.raises(ApiError):
        conversation.delete("a")


def test_old_sound_goes_before_old_words() -> None:
    conversation = filled(spoken("a", "one"), answer("b", "two"), spoken("c", "three"), max_seconds=12)
    assert [item.parts[0].audio is not None for item in conversation.items] == [False, True, True]
    assert conversation.find("a").told(with_audio=True)["content"] == [
        {"type": "input_audio", "transcript": "one", "audio": None}
    ]
    assert texts(conversation.history())[:2] == ["one", "two"]


def test_the_oldest_items_make_room() -> None:
    conversation = filled(user("a", "one"), answer("b", "two"), max_items=2)
    assert conversation.add(user("c", "three")) == ("b", ["a"])
    assert [item.id for item in conversation.items] == ["b", "c"]
