"""A voice behind HTTP, against a real server that is busy, wrong or gone."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from speechgpt.speech.config import SpeechServiceSection, VoiceSection
from speechgpt.speech.voices import Voice, VoiceError


def wav(seconds: float = 0.5, rate: int = 24_000, channels: int = 2) -> bytes:
    wave = np.sin(np.arange(int(seconds * rate)) * 0.1)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave] * channels, axis=1), rate, format="WAV")
    return buffer.getvalue()


def voice(url: str, **service: Any) -> Voice:
    section = SpeechServiceSection(url=url, key_variable="A_TEST_KEY", **service)
    return Voice(VoiceSection(engine="http", voice="nova", service=section, speed=(1.25, 1.25)))


def test_it_speaks_and_gives_its_key(serve, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", "s3cret")
    service = serve((200, {}, wav()))
    wave = voice(service.url, model="m").say("hello", 1)
    assert wave.dtype == np.float32 and abs(len(wave) - 8_000) < 20
    (asked,) = service.asked
    assert asked == {
        "path": "/v1/audio/speech",
        "key": "Bearer s3cret",
        "model": "m",
        "input": "hello",
        "voice": "nova",
        "response_format": "wav",
        "speed": 1.25,
    }


def test_a_busy_service_is_asked_again_when_it_says(serve, monkeypatch):
    monkeypatch.delenv("A_TEST_KEY", raising=False)
    waits: list[float] = []
    monkeypatch.setattr("speechgpt.speech.http_service.time.sleep", waits.append)
    service = serve((429, {"retry-after": "3"}, b"busy"), (503, {}, b""), (200, {}, wav()))
    assert len(voice(service.url).say("hello", 1)) > 7_000
    assert len(service.asked) == 3 and service.asked[0]["key"] is None
    assert waits[0] == 3 and 0.75 <= waits[1] <= 1.25


def test_a_refusal_is_final_and_speaks_of_the_key_without_showing_it(serve, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", "s3cret")
    service = serve((401, {}, b"no such key"))
    with pytest.raises(VoiceError, match=r"401: no such key \(the key comes from A_TEST_KEY, which is set\)") as raised:
        voice(service.url).say("hello", 1)
    assert len(service.asked) == 1 and "s3cret" not in str(raised.value)


def test_attempts_end(serve, monkeypatch):
    monkeypatch.setattr("speechgpt.speech.http_service.time.sleep", lambda seconds: None)
    service = serve((500, {}, b"broken"))
    with pytest.raises(VoiceError, match="no speech after 3 attempts: 500: broken"):
        voice(service.url, retries=2).say("hello", 1)
    assert len(service.asked) == 3
    with pytest.raises(VoiceError, match=r"no speech after 2 attempts: Connect"):
        voice("http://127.0.0.1:9/v1", retries=1).say("hello", 1)


def test_what_is_no_sound_is_said(serve):
    service = serve((200, {}, b"<html>"))
    with pytest.raises(VoiceError, match=r"no WAV file came back \(6 bytes\)"):
        voice(service.url).say("hello", 1)


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_a_recipe_holds_no_secret(url):
    with pytest.raises(ValidationError, match="key_variable"):
        SpeechServiceSection(url=url)


def test_a_service_belongs_to_http_alone():
    with pytest.raises(ValidationError, match="needs a `service`"):
        VoiceSection(engine="http")
    with pytest.raises(ValidationError, match="no other engine has one"):
        VoiceSection(engine="espeak", service=SpeechServiceSection(url="http://host/v1"))
