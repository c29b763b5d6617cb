"""The console: what a line means, what is kept, and a whole conversation with a bundle."""

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from serve.chat import Answer, ChatError, Partner, Spoken, Written, converse, keep, understand
from speechgpt.speech.audio import decode, encode


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    time = np.arange(16_000) / 16_000
    file = tmp_path / "my question.wav"
    syllables = np.sin(2 * np.pi * 2 * time) ** 2
    file.write_bytes(
        encode((0.4 * syllables * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32), "wav")
    )
    return file


def test_a_sound_file_alone_is_a_question(recording: Path) -> None:
    assert understand(str(recording)) == Spoken(recording, dictation=False)


def test_what_follows_the_mark_is_recognised_or_read(recording: Path) -> None:
    assert understand(f"Recognize this speech, this is input: {recording}") == Spoken(recording, dictation=True)
    spoken = understand("Read this sentence aloud, this is input: today is a sunny day.")
    assert spoken == Written("today is a sunny day.", reading=True)


def test_anything_else_is_a_typed_question() -> None:
    assert understand("what is an .mp3") == Written("what is an .mp3", reading=False)


def test_a_missing_file_is_not_read_as_a_question() -> None:
    with pytest.raises(ChatError, match="no such file"):
        understand("prompts/0.wav")


def test_answers_are_numbered_and_kept(tmp_path: Path) -> None:
    first = keep(tmp_path, "hello", Answer(None, "hi", b"RIFF", "digest"))
    second = keep(tmp_path, "again", Answer("heard", "hi", None, "digest"))
    assert (first["audio"], second["audio"]) == ("wav/answer_0.wav", None)
    assert (tmp_path / "wav" / "answer_0.wav").read_bytes() == b"RIFF"
    lines = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, second]


@pytest.fixture
def partner(http: TestClient) -> Partner:
    client = httpx.AsyncClient(transport=httpx.ASGITransport(http.app), base_url="http://bundle")
    return Partner(client, asyncio.Runner())


def test_a_conversation(partner: Partner, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(
        [str(recording), "", f"Recognize, this is input: {recording}", "Read, this is input: hello", "gone.wav", "quit"]
    )
    converse(partner, tmp_path / "out", lambda: next(lines))
    printed = capsys.readouterr().out
    assert "Transcript: " in printed and "Text response: " in printed and "gone.wav: no such file" in printed
    records = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    question, dictation, reading = records
    assert question["transcript"] and question["text"] and question["bundle"]
    assert dictation["text"] and not dictation["audio"]
    for record in (question, reading):
        assert len(decode(tmp_path / "out" / record["audio"])) > 0


def test_the_services_own_words_reach_the_user(partner: Partner, tmp_path: Path) -> None:
    silent = tmp_path / "silent.wav"
    silent.write_bytes(encode(np.zeros(16_000, np.float32), "wav"))
    with pytest.raises(ChatError, match="silent"):
        partner.answer(understand(str(silent)))


def test_nobody_there() -> None:
    client = httpx.AsyncClient(base_url="http://127.0.0.1:9")
    with pytest.raises(ChatError, match="127.0.0.1:9"):
        Partner(client, asyncio.Runner())
