"""Rows 2, 3, 6, 7 and 8 of the matrix on a real Ray Serve, whose model says something without end.

The rows of PRACTICE §5 and where each is proved:

| row | in this process | on a service |
|---|---|---|
| 1 auth | test_keys, test_guard: keys, closed routes, WebSockets | test_keys_service: every route, no log |
| 2 size | test_guard: exact, unread, compressed, WebSocket frames | here: declared, chunked, in parts; memory |
| 3 decode | test_hostile_input: bombs, odd rates, polyglots | here: bombs among honest clips; memory |
| 4 URL input | test_hostile_input: no address is followed | - (the same code) |
| 5 prompt | test_hostile_input: markers, units | - (the same code) |
| 6 limits | test_limits, test_guard: rates, quotas, places | test_keys_service: over replicas; here: deadline, queue |
| 7 cancel | test_engine: a reply that nobody takes | here: each stage, a crowd; evidence: 500 |
| 8 drain | - | here: a stream outlives the stop; evidence: SIGTERM, killed replicas |
"""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile_clients
import httpx
import pytest
from hostile_clients import Vanishing, as_form, as_json, endless_body, first_line, request, vanish
from hostile_sound import EIGHT_HOURS, babble, silence, wav
from live_service import LiveService, live_service, until
from load import QUESTION

from serve import run
from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHAT, SPEECH, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/audio/speech", "/v1/audio/transcriptions"
DEADLINE = 20.0
BODY = 2_000_000
PLACES, QUEUE = 4, 8
MEBIBYTE = 1 << 20


def written(text: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": "endless", "messages": [{"role": "user", "content": text}], **more}


def spoken(**more: Any) -> dict[str, Any]:
    return written(modalities=["text", "audio"], audio={"voice": "alloy", "format": "pcm16"}, **more)


@pytest.fixture(scope="module")
def endless(endless_bundle: Path, tiny: Recipe, ray_cluster: None) -> Iterator[LiveService]:
    language = tiny.serving.language.model_copy(
        update={"max_ongoing_requests": PLACES, "max_queued_requests": QUEUE, "batch": PLACES}
    )
    generation = tiny.generation.model_copy(update={"max_new_tokens": 1 << 20})
    chosen = tiny.model_copy(update={"generation": generation})
    serving = {"language": language, "request_timeout_seconds": DEADLINE, "max_body_bytes": BODY}
    with live_service(endless_bundle, chosen, **serving) as service:
        yield service


def idle(service: LiveService) -> bool:
    return not any(service.ongoing().values())


def test_a_body_above_the_limit_is_refused_before_it_is_sent(endless: LiveService, clip: bytes) -> None:
    """Row 2: a declared length, multipart, base64."""
    for path in (CHAT, SPEECH, TRANSCRIPTIONS, "/nowhere"):
        head = request(path, b"", length=BODY + 1)
        assert " 413 " in first_line(endless.url, head), "it waits for the body"
    data = base64.b64encode(bytes(BODY)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    big = [as_json(CHAT, written([part])), as_form(TRANSCRIPTIONS, {"model": "endless"}, bytes(BODY))]  # type: ignore[arg-type]
    for whole in big:
        assert " 413 " in first_line(endless.url, whole[: len(whole) // 10])


def test_bodies_without_end_take_no_memory(endless: LiveService) -> None:
    """Row 2: chunks, eight clients at once who would send 512 MiB."""
    processes = [endless.proxy(), *endless.processes()]
    before = [process.memory_info().rss for process in processes]
    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(lambda _: endless_body(endless.url, CHAT, 64 * MEBIBYTE), range(8)))
    grown = [process.memory_info().rss - old for process, old in zip(processes, before, strict=True)]
    assert {line.split(" ")[1] for line, _ in ends} == {"413"}
    # What was sent beyond the limit is what lay in sockets.
    assert max(sent for _, sent in ends) < BODY + 32 * MEBIBYTE
    assert max(grown) < 8 * BODY + 64 * MEBIBYTE
    assert until(lambda: idle(endless))


def test_sound_that_is_a_trap_harms_nobody(endless: LiveService, clip: bytes) -> None:
    """Row 3: bombs among honest clips, which are heard as ever; the encoder's memory stays."""
    traps = [silence(EIGHT_HOURS, 1000), silence(7, 655_350, 8), wav(16_000, 65_535, babble(131_070)),
             wav(16_000, 1, babble(16_000))[:-8000]]  # fmt: skip
    [encoder] = endless.replicas("Encoder")

    def hear(sound: bytes) -> int:
        form = {"data": {"model": "endless"}, "files": {"file": ("a.wav", sound)}}
        return httpx.post(endless.url + TRANSCRIPTIONS, timeout=60, **form).status_code

    assert hear(clip) == 200
    before = encoder.rss()
    mixed = [sound for trap in traps for sound in (trap, clip)] * 2
    with ThreadPoolExecutor(3) as pool:
        statuses = list(pool.map(hear, mixed))
    assert set(statuses[0::2]) == {400} and set(statuses[1::2]) == {200}
    assert encoder.rss() - before < 192 * MEBIBYTE
    assert [replica.pid for replica in endless.replicas("Encoder")] == [encoder.pid]


def test_the_deadline_stops_the_work(endless: LiveService) -> None:
    """Row 6: an answer that no machine finishes in time, whole and streamed; nothing goes on working afterwards."""

    def whole() -> httpx.Response:
        return httpx.post(endless.url + CHAT, json=spoken(), timeout=4 * DEADLINE)

    def streamed() -> list[str]:
        with httpx.stream("POST", endless.url + CHAT, json=spoken(stream=True), timeout=4 * DEADLINE) as reply:
            assert reply.status_code == 200
            return [line for line in reply.iter_lines() if line]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(whole), pool.submit(streamed)
        late, lines = first.result(), second.result()
    assert late.status_code == 504 and late.headers["x-should-retry"] == "false"
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert len(lines) > 3 and json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert until(lambda: idle(endless), 30), endless.ongoing()


def test_a_full_queue_refuses_at_once(endless: LiveService) -> None:
    """Row 6: every place and every place in the queue is held; the next is told so, and let in once one is free."""
    host, port = endless.url.removeprefix("http://").split(":")
    [vocoder], [language] = endless.replicas("Vocoder"), endless.replicas("LanguageModel")
    held: list[socket.socket] = []

    def in_place() -> bool:
        return vocoder.ongoing() == len(held) and language.ongoing() == min(len(held), PLACES)

    try:
        # One after the other: of those who come together, some are refused before others have left the queue.
        while len(held) < PLACES + QUEUE:
            held.append(socket.create_connection((host, int(port))))
            held[-1].sendall(as_json(CHAT, spoken(stream=True)))
            assert until(in_place, DEADLINE, 0.02), (vocoder.ongoing(), language.ongoing())
        began = time.monotonic()
        replies = [httpx.post(endless.url + CHAT, json=spoken(stream=True), timeout=DEADLINE) for _ in range(8)]
        taken = (time.monotonic() - began) / 8
    finally:
        for connection in held:
            connection.close()
    assert {reply.status_code for reply in replies} == {429}
    assert {reply.json()["error"]["code"] for reply in replies} == {"at_capacity"}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies)
    # Far below the time of any answer; figures stand in the report of evidence.
    assert taken < DEADLINE / 10
    assert until(lambda: idle(endless), 60), endless.ongoing()
    assert httpx.post(endless.url + CHAT, json=written(), timeout=60).status_code == 200


STAGES = {
    "within the head": Vanishing(as_json(CHAT, spoken()), 0.1, 0, 0.2),
    "within the body": Vanishing(as_json(CHAT, spoken()), 0.9, 0, 0.5),
    "before the answer": Vanishing(as_json(CHAT, spoken()), 1, 0, 2),
    "at the first words": Vanishing(as_json(CHAT, spoken(stream=True)), 1, 16, 0),
    "within the sound": Vanishing(as_json(CHAT, spoken(stream=True)), 1, 20_000, 0),
    "within the reading": Vanishing(
        as_json(SPEECH, {"model": "endless", "voice": "alloy", "input": "hello", "response_format": "pcm"}),
        1,
        20_000,
        0,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_who_hangs_up_stops_the_work(endless: LiveService, stage: str) -> None:
    """Row 7: at each stage of an answer that would go on for minutes."""
    vanish(endless.url, [STAGES[stage]] * 3, 3)
    assert until(lambda: idle(endless), DEADLINE / 2, 0.1), f"{stage}: {endless.ongoing()}"


def test_a_crowd_that_vanishes_leaves_nothing(endless: LiveService, clip: bytes) -> None:
    """Row 7: sixty clients, gone at random moments; text, sound both ways, transcriptions. 500 of them in evidence."""
    requests = [
        as_json(CHAT, spoken(stream=True)),
        as_json(CHAT, written(stream=True)),
        as_json(CHAT, spoken()),
        as_form(TRANSCRIPTIONS, {"model": "endless"}, clip),
        as_json(SPEECH, {"model": "endless", "voice": "alloy", "input": "hello", "response_format": "mp3"}),
    ]
    vanish(endless.url, hostile_clients.moments(requests, 60, seed=1), at_once=PLACES + QUEUE, seconds=10)
    assert until(lambda: idle(endless), DEADLINE / 2, 0.1), endless.ongoing()
    assert httpx.post(endless.url + CHAT, json=written(), timeout=60).status_code == 200


def test_what_has_begun_is_finished_while_the_service_stops(endless: LiveService) -> None:
    """Row 8: the last test here. A stream goes on to its end, who comes later may come again."""
    tokens, lines, first = 400, [], threading.Event()

    def listen() -> None:
        asked = spoken(stream=True, max_completion_tokens=tokens)
        with httpx.stream("POST", endless.url + CHAT, json=asked, timeout=4 * DEADLINE) as reply:
            for line in reply.iter_lines():
                lines.extend([line] if line else [])
                first.set()

    with ThreadPoolExecutor(2) as pool:
        listening = pool.submit(listen)
        assert first.wait(60)
        stopping = pool.submit(run.stop, endless.source)
        late: set[int] = set()
        while not stopping.done():
            late.add(httpx.post(endless.url + CHAT, json=written(), timeout=60).status_code)
        stopping.result()
        listening.result()
    assert lines[-1] == "data: [DONE]"
    finished = json.loads(lines[-2].removeprefix("data: "))
    assert finished["choices"][0]["finish_reason"] == "length"
    # Until the routes are gone requests are answered; after that each is told to come again.
    assert late <= {200, 429, 503} and 503 in late
