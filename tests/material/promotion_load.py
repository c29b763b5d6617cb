"""A steady load on a service from the official client: streamed speech, plain text and spoken text by turns, each kind
from a thread of its own. Every request is written down with what came of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai

QUESTION = "what is two plus three"


@dataclass
class Served:
    """One request. bundle: digest in the reply's header. also: what else names a bundle in it, cut to 12 digits."""

    kind: str
    began: float
    ended: float
    bundle: str = ""
    also: set[str] = field(default_factory=set)
    error: str = ""


@dataclass
class Load:
    requests: list[Served] = field(default_factory=list)

    @property
    def failed(self) -> list[Served]:
        return [request for request in self.requests if request.error]

    def by(self, digest: str) -> list[Served]:
        return [request for request in self.requests if request.bundle == digest]


def _spoken(client: openai.OpenAI) -> tuple[str, set[str]]:
    reply = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        stream=True,
    )
    chunks = list(reply.parse())
    assert chunks[-1].choices[0].finish_reason and len(chunks) > 3, "a stream that was cut off"
    return reply.headers["x-speechgpt-bundle"], {str(chunk.system_fingerprint) for chunk in chunks}


def _plain(client: openai.OpenAI) -> tuple[str, set[str]]:
    reply = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}]
    )
    return reply.headers["x-speechgpt-bundle"], {str(reply.parse().system_fingerprint)}


def _read_aloud(client: openai.OpenAI) -> tuple[str, set[str]]:
    with client.audio.speech.with_streaming_response.create(
        model="tiny", voice="alloy", input="two plus three is five", response_format="pcm"
    ) as reply:
        assert reply.read()
        return reply.headers["x-speechgpt-bundle"], set()


KINDS: dict[str, Callable[[openai.OpenAI], tuple[str, set[str]]]] = {
    "spoken": _spoken,
    "plain": _plain,
    "read": _read_aloud,
}


@contextmanager
def load(url: str) -> Iterator[Load]:
    """The load while the block lasts; whatever has begun is finished."""
    seen, stop = Load(), threading.Event()

    def keep_asking(kind: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=300)
        while not stop.is_set():
            request = Served(kind, time.monotonic(), 0.0)
            try:
                request.bundle, fingerprints = KINDS[kind](client)
                request.also = {fingerprint.removeprefix("fp_") for fingerprint in fingerprints}
            except (openai.OpenAIError, AssertionError) as error:
                headers = getattr(getattr(error, "response", None), "headers", {})
                request.bundle = headers.get("x-speechgpt-bundle", "")
                request.error = f"{type(error).__name__}: {error}"
            request.ended = time.monotonic()
            seen.requests.append(request)
            stop.wait(0.05)

    threads = [threading.Thread(target=keep_asking, args=(kind,)) for kind in KINDS]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
