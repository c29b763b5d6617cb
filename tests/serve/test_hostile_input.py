"""Rows 3, 4 and 5 of the matrix: sound that is a trap, addresses in place of sound, markers in users' words."""

import base64
import socket
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hostile_sound import EIGHT_HOURS, babble, silence, wav
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serve.prompting import Ask, Prompt, Read, Sampling
from serve.service import Service
from speechgpt.language.prompts import Turn
from speechgpt.language.segments import RELEASED_MARKERS, TAG_MARKERS
from speechgpt.speech.vocoder import VocoderError

CHAT, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/audio/transcriptions"


def listen(http: TestClient, clip: bytes) -> Any:
    return http.post(TRANSCRIPTIONS, data={"model": "tiny"}, files={"file": ("a.wav", clip)})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: silence(EIGHT_HOURS, 1000), "audio_too_long"),
        (lambda: silence(7, 655_350, 8), "audio_too_large"),
        (lambda: wav(1, 1, babble(30)), "audio_too_long"),
        (lambda: wav(0, 1, babble(8000)), "audio_unreadable"),
        (lambda: wav(16_000, 0, babble(8000)), "audio_unreadable"),
        (lambda: wav(16_000, 65_535, babble(131_070)), "audio_unreadable"),
        (lambda: wav(16_000, 1, babble(160_000), promised=100), "audio_too_short"),
        (lambda: wav(16_000, 1, babble(16_000))[:-8000], "audio_truncated"),
        (lambda: b"PK\3\4" + wav(16_000, 1, babble(16_000)), "audio_unreadable"),
        (lambda: b"\x1f\x8b\x08" + bytes(500), "audio_unreadable"),
        (lambda: b"\0\0\0\x18ftypM4A " + bytes(500), "audio_unreadable"),
    ],
    ids=["8 hours", "8 x 655 kHz", "1 Hz", "0 Hz", "0 channels", "65535 channels", "header too short", "cut", "zip",
         "gzip", "empty mp4"],
)  # fmt: skip
def test_sound_that_is_a_trap_is_refused(http: TestClient, make: Any, code: str) -> None:
    """Row 3: before it is decoded, in moments, within the memory that an honest clip takes."""
    clip = make()
    tracemalloc.start()
    began = time.process_time()
    try:
        reply = listen(http, clip)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert time.process_time() - began < 4 and peak < len(clip) * 4 + (8 << 20)


@pytest.mark.parametrize(
    "clip",
    [
        wav(16_000, 1, babble(16_000), promised=0xFFFFFFFF),
        wav(16_000, 1, babble(16_000), promised=1 << 30),
        wav(16_000, 1, babble(16_000)) + b"PK\3\4" + bytes(100),
        wav(16_000, 64, np.repeat(np.frombuffer(babble(12_000), "<i2"), 64).tobytes()),
        wav(1_000_000, 1, np.repeat(np.frombuffer(babble(12_000), "<i2"), 62).tobytes()),
    ],
    ids=["endless", "promises 1 GiB", "zip behind", "64 channels", "1 MHz"],
)
def test_odd_sound_is_taken_for_what_it_is(http: TestClient, clip: bytes) -> None:
    """Row 3: a length in a header is no reason to take memory."""
    reply = listen(http, clip)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["input_token_details"]["audio_tokens"] < 60


@pytest.fixture
def trap() -> Iterator[tuple[str, socket.socket]]:
    """An address that must not be visited."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        yield f"127.0.0.1:{server.getsockname()[1]}", server


ADDRESSES = ["http://{}/a.wav", "https://{}/a.wav", "file:///etc/passwd", "/etc/passwd", "../../etc/passwd",
             "concat:/etc/passwd|/etc/hosts", "data:audio/wav;base64,UklGRg==", "s3://bucket/a.wav"]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_sound(http: TestClient, trap: tuple[str, socket.socket], address: str) -> None:
    """Row 4: nowhere is an address taken, and nothing that looks like one is followed."""
    host, server = trap
    address = address.format(host)

    def chat(part: dict[str, Any]) -> dict[str, Any]:
        reply = http.post(CHAT, json={"model": "tiny", "messages": [{"role": "user", "content": [part]}]})
        assert reply.status_code == 400 and "root:" not in reply.text
        return reply.json()["error"]

    audio = {"format": "wav"}
    bare = chat({"type": "input_audio", "input_audio": audio | {"data": address}})
    assert bare["code"] in ("invalid_base64", "audio_unreadable")
    encoded = base64.b64encode(address.encode()).decode()
    assert chat({"type": "input_audio", "input_audio": audio | {"data": encoded}})["code"] == "audio_unreadable"
    named = chat({"type": "input_audio", "input_audio": audio | {"data": "AAAA", "url": address}})
    assert named["code"] == "unknown_parameter"
    for kind in ("audio_url", "input_file", "image_url"):
        assert chat({"type": kind, kind: {"url": address}})["code"] == "unsupported_value"
    playlists = [
        f"#EXTM3U\nftyp\n#EXTINF:1,\n{address}\n",
        f"ffconcat version 1.0\nfile '{address}'\n",
        f"[playlist]\nftyp=\nFile1={address}\n",
    ]
    for playlist in playlists:
        reply = listen(http, playlist.encode())
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "audio_unreadable")
    for field in ("url", "file_url", "path"):
        form = {"model": "tiny", field: address}
        reply = http.post(TRANSCRIPTIONS, data=form, files={"file": ("a.wav", wav(16_000, 1, babble(16_000)))})
        assert reply.json()["error"]["code"] == "unknown_parameter"
    reply = http.post(TRANSCRIPTIONS, data={"model": "tiny", "file": address})
    assert reply.status_code == 400 and "root:" not in reply.text
    named = http.post(TRANSCRIPTIONS, data={"model": "tiny"}, files={"file": (address, b"no sound")})
    assert named.json()["error"]["code"] == "audio_unreadable"
    with pytest.raises(BlockingIOError):
        server.accept()


MARKED = (
    st.lists(
        st.sampled_from(
            [*RELEASED_MARKERS, *TAG_MARKERS, "<0>", "<31>", "<999>", "<s>", "</s>", "<unk>", "<pad>", " ", "a"]
        )
        | st.text(max_size=4),
        min_size=1,
        max_size=12,
    )
    .map("".join)
    .filter(str.strip)
)


@settings(max_examples=30)
@given(MARKED, MARKED)
def test_users_words_hold_no_control_token(service: Service, words: str, earlier: str) -> None:
    """Row 5: whatever is typed, in any message and in text to be read, the prompt's control tokens are the same."""
    prompter = service._pipeline._prompter  # type: ignore[attr-defined]
    vocabulary = prompter._wording.vocabulary
    control = vocabulary.control_ids

    def controls(task: Ask | Read) -> list[int]:
        prompt = prompter.prompt(task)
        assert isinstance(prompt, Prompt) and prompt.audio_tokens == 0
        return [token for token in prompt.ids if token in control or vocabulary.is_unit(token)]

    sampling = Sampling(service._generation)

    def dialogue(first: str, last: str) -> Ask:
        turns = (Turn("user", text=first), Turn("assistant", text=first), Turn("user", text=last))
        return Ask(turns, "chain", sampling)

    assert controls(dialogue(earlier, words)) == controls(dialogue("a", "b"))
    assert controls(Read(words, sampling)) == controls(Read("a", sampling))


def test_units_outside_the_codebook_are_refused(service: Service) -> None:
    """Row 5: no request can name a unit; what stands outside the codebook is refused where units are used."""
    vocabulary = service._pipeline._prompter._wording.vocabulary  # type: ignore[attr-defined]
    vocoder = service._pipeline._vocoder  # type: ignore[attr-defined]
    for unit in (-1, 32, 1 << 40):
        with pytest.raises(ValueError, match="outside the codebook"):
            vocabulary.unit_ids([unit])
        with pytest.raises((VocoderError, OverflowError)):
            vocoder.checked([unit])
