"""The official OpenAI client against a real Ray Serve."""

import base64
import json
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from live_service import until
from openai.types.chat import ChatCompletion

from serve.meters import GATEWAY_METRICS, VOCODER_METRICS
from speechgpt.speech.audio import decode, encode

pytestmark = pytest.mark.ray

SELDOM = {
    "speechgpt_rejected_total",
    "speechgpt_cancelled_total",
    "speechgpt_active_sessions",
    "speechgpt_responses_total",
    "speechgpt_stream_underruns_total",
}
"""Counted when it happens, which nothing here makes sure of."""
QUESTION = "what is two plus three"
ANSWER = "two plus three is five"
SPOKEN_REPLY = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}


@pytest.fixture(scope="module")
def recording() -> bytes:
    time = np.arange(16_000) / 16_000
    syllables = np.sin(2 * np.pi * 2 * time) ** 2
    return encode((0.4 * syllables * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32), "wav")


def spoken(recording: bytes) -> list[dict]:
    data = base64.b64encode(recording).decode()
    return [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]


def ask(client: openai.OpenAI, *messages: dict, **options: object) -> ChatCompletion:
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)  # type: ignore[call-overload]


def test_asked_by_voice_it_answers_by_voice(client: openai.OpenAI, recording: bytes) -> None:
    reply = ask(client, {"role": "user", "content": spoken(recording)}, **SPOKEN_REPLY)
    message = reply.choices[0].message
    assert message.audio is not None and message.audio.transcript
    assert len(decode(base64.b64decode(message.audio.data))) > 0
    assert reply.model_extra is not None and reply.model_extra["speechgpt"]["question_transcript"]
    assert reply.usage is not None and reply.usage.prompt_tokens_details and reply.usage.completion_tokens_details
    assert reply.usage.prompt_tokens_details.audio_tokens and reply.usage.completion_tokens_details.audio_tokens


def test_a_spoken_answer_can_be_referred_to(client: openai.OpenAI, recording: bytes) -> None:
    first = {"role": "user", "content": spoken(recording)}
    answer = ask(client, first, **SPOKEN_REPLY).choices[0].message.audio
    assert answer is not None
    short = ask(client, {"role": "user", "content": "and now"})
    long = ask(client, first, {"role": "assistant", "audio": {"id": answer.id}}, {"role": "user", "content": "and now"})
    assert short.usage and long.usage and long.usage.prompt_tokens > short.usage.prompt_tokens
    with pytest.raises(openai.NotFoundError) as caught:
        ask(
            client, first, {"role": "assistant", "audio": {"id": "audio_other"}}, {"role": "user", "content": "and now"}
        )
    assert caught.value.code == "audio_not_found"


def test_streamed_audio_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(
        client,
        {"role": "user", "content": QUESTION},
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
    )
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        stream=True,
        stream_options={"include_usage": True},
    )
    sound, transcript, last = b"", "", None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            if audio := choice.delta.audio:
                sound += base64.b64decode(audio.data or "")
                transcript += audio.transcript or ""
    expected = whole.choices[0].message.audio
    assert expected is not None and transcript == expected.transcript
    # Computed piece by piece it may fall to the other side of a rounding.
    pieces, together = (np.frombuffer(data, "<i2").astype(int) for data in (sound, base64.b64decode(expected.data)))
    assert len(pieces) == len(together) and np.abs(pieces - together).max() <= 1
    assert last is not None and last.usage == whole.usage


def test_speech_is_heard_before_it_is_whole(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tiny", voice="alloy", input=ANSWER, response_format="pcm", stream_format="sse"
    ) as reply:
        events = list(reply.iter_lines())
    told = [json.loads(line.removeprefix("data: ")) for line in events if line]
    assert [event["type"] for event in told[-1:]] == ["speech.audio.done"]
    deltas = [event for event in told if event["type"] == "speech.audio.delta"]
    assert len(deltas) > 1 and all(base64.b64decode(delta["audio"]) for delta in deltas)


def test_listeners_who_hang_up_leave_nothing_behind(client: openai.OpenAI, service_url: str, tiny_bundle: Path) -> None:
    """More than there is room for, one after the other, each gone after its first chunk."""
    from ray import serve

    from serve.app import application_name
    from serve.bundles import find

    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    spoken = body | {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    for asked in [body, spoken] * 6:
        with httpx.stream("POST", f"{service_url}/v1/chat/completions", json=asked, timeout=60) as reply:
            assert next(reply.iter_lines()).startswith("data: ")
    language = serve.get_deployment_handle("LanguageModel", application_name(find(str(tiny_bundle), "")))
    until = time.monotonic() + 5
    while language.ongoing.remote().result() and time.monotonic() < until:
        time.sleep(0.1)
    assert language.ongoing.remote().result() == 0
    assert ask(client, {"role": "user", "content": QUESTION}).choices[0].message.content


def test_transcribes(client: openai.OpenAI, recording: bytes) -> None:
    whole = client.audio.transcriptions.create(model="tiny", file=("question.wav", recording))
    assert whole.text
    verbose = client.audio.transcriptions.create(
        model="tiny", file=("q.wav", recording), response_format="verbose_json"
    )
    assert (verbose.text, verbose.duration) == (whole.text, 1.0)
    events = list(client.audio.transcriptions.create(model="tiny", file=("q.wav", recording), stream=True))
    assert events[-1].type == "transcript.text.done" and events[-1].text == whole.text


def test_speaks(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="tiny", voice="alloy", input="hello", response_format="flac"
    ) as reply:
        assert reply.headers["content-type"] == "audio/flac"
        assert len(decode(reply.read())) > 0


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "speechgpt"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(
            client.with_options(max_retries=0),
            {"role": "user", "content": "hi"},
            extra_body={"model": "gpt-4o-audio-preview"},
        )
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own(client: openai.OpenAI, recording: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as silent:
        client.audio.transcriptions.create(model="tiny", file=("s.wav", encode(np.zeros(16_000, np.float32), "wav")))
    assert (silent.value.code, silent.value.param) == ("audio_silent", "file")
    with pytest.raises(openai.BadRequestError) as several:
        ask(client, {"role": "user", "content": "hi"}, n=2)
    assert (several.value.code, several.value.param, several.value.type) == (
        "unsupported_parameter",
        "n",
        "invalid_request_error",
    )


def test_requests_at_once_answer_as_alone(client: openai.OpenAI, recording: bytes) -> None:
    contents = [QUESTION, spoken(recording), "hello world", spoken(recording)]

    def answer(content: object) -> str | None:
        return ask(client, {"role": "user", "content": content}).choices[0].message.content

    alone = [answer(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, contents * 2)) == alone * 2


def test_spoken_answers_at_once_sound_as_alone(client: openai.OpenAI, recording: bytes) -> None:
    contents = [QUESTION, spoken(recording), "hello world", "what is three plus four", "is it cold"]

    def sound(content: object) -> np.ndarray:
        audio = ask(client, {"role": "user", "content": content}, **SPOKEN_REPLY).choices[0].message.audio
        return decode(base64.b64decode(audio.data)) if audio else np.zeros(0)

    alone = [sound(content) for content in contents]
    assert len({wave.tobytes() for wave in alone if len(wave)}) > 1, "which one could take for another"
    with ThreadPoolExecutor(4) as pool:
        for wave, expected in zip(pool.map(sound, contents * 2), alone * 2, strict=True):
            np.testing.assert_allclose(wave, expected, rtol=0, atol=2 / 32768)


def test_replies_carry_bundle_and_request_id(service_url: str, service: object) -> None:
    reply = httpx.get(f"{service_url}/v1/models", headers={"x-request-id": "trace-7"})
    assert reply.headers["x-speechgpt-bundle"] == service.served.digest  # type: ignore[attr-defined]
    assert reply.headers["x-request-id"] == "trace-7"
    assert httpx.get(f"{service_url}/v1/models").headers["x-request-id"]


def test_health_readiness_and_metrics(service_url: str) -> None:
    assert httpx.get(f"{service_url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{service_url}/readyz", timeout=30)
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "waiting_for": []})
    page = httpx.get(f"{service_url}/metrics", timeout=30).text
    assert "ray_serve" in page and page.count("# TYPE ray_serve_num_http_requests") <= 1


def test_a_request_s_trace_goes_through_all_deployments(service_url: str, clip: bytes) -> None:
    from ray.serve._private.logging_utils import get_serve_logs_dir

    asked = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [asked]}],
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "pcm16"},
        "stream": True,
    }
    sent = {"x-request-id": "trace-8"}
    assert httpx.post(f"{service_url}/v1/chat/completions", json=body, headers=sent, timeout=120).status_code == 200

    def spans() -> dict[str, set[str]]:
        """Deployments by trace of the spans that belong to the request."""
        found: dict[str, set[str]] = {}
        for file in Path(get_serve_logs_dir(), "spans").iterdir():
            text = file.read_text()
            # One object after the other.
            while text.strip():
                span, end = json.JSONDecoder().raw_decode(text.lstrip())
                text = text.lstrip()[end:]
                if span["attributes"].get("request_id") == "trace-8":
                    found.setdefault(span["context"]["trace_id"], set()).add(span["attributes"].get("deployment", ""))
        return found

    everyone = {"Gateway", "Encoder", "LanguageModel", "Vocoder"}
    assert until(lambda: any(everyone <= deployments for deployments in spans().values()), 60), spans()
    assert len(spans()) == 1


def test_what_was_asked_is_counted(service_url: str, client: openai.OpenAI, clip: bytes) -> None:
    client.audio.transcriptions.create(model="tiny", file=("a.wav", clip))
    with client.audio.speech.with_streaming_response.create(
        model="tiny", voice="alloy", input="two plus three", response_format="pcm"
    ) as said:
        assert said.read()
    assert httpx.post(f"{service_url}/v1/audio/speech", json={}, timeout=30).status_code == 400

    def missing() -> set[str]:
        """Of what is to be counted. Replicas tell Ray of it every few seconds."""
        page = httpx.get(f"{service_url}/metrics", timeout=30).text
        lines = [line for line in page.splitlines() if line.startswith("ray_speechgpt_")]
        wanted = {name: (name,) for name in (*GATEWAY_METRICS, *VOCODER_METRICS) if name not in SELDOM}
        wanted["a stage"] = ("stage_seconds_count", 'stage="hear"')
        wanted["a stream"] = ("stage_seconds_count", 'stage="answer aloud"')
        wanted["a refusal"] = ("requests_total", 'route="POST /v1/audio/speech"', 'status="400"')
        return {
            name for name, words in wanted.items() if not any(all(word in line for word in words) for line in lines)
        }

    assert until(lambda: not missing(), 60), missing()


def test_a_client_cannot_shorten_or_hide_from_the_policy(service_url: str) -> None:
    impatient = {"x-request-timeout-seconds": "0.000001", "x-request-disconnect-disabled": "?1"}
    assert httpx.get(f"{service_url}/v1/models", headers=impatient).status_code == 200
    assert httpx.get(f"{service_url}/-/routes").status_code == 404


def test_an_endless_body_is_cut_off(service_url: str) -> None:
    """Written by hand, because HTTP libraries send all of a body before they look for a reply."""
    host, port = service_url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    sent, reply = 0, b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        while not reply and sent < 200 << 20:
            readable, writable, _ = select.select([connection], [connection], [], 30)
            if readable:
                reply = connection.recv(4096)
            elif writable:
                sent += connection.send(chunk)
    assert b" 413 " in reply.split(b"\r\n")[0]
    assert sent < 100 << 20


def test_too_many_requests_are_told_to_come_back(client: openai.OpenAI, service_url: str) -> None:
    """More at once than may wait: the surplus gets 429 with Retry-After, and the client's own retries get through."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}

    def once(_: int) -> httpx.Response:
        return httpx.post(f"{service_url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(once, range(32)))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert refused and {reply.status_code for reply in replies} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.json()["error"]["code"] for reply in refused} == {"at_capacity"}
    patient = client.with_options(max_retries=10)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: ask(patient, {"role": "user", "content": QUESTION}), range(12)))
    assert len(answers) == 12
