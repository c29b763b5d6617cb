"""Row 6 of the matrix, under load: ten times what a service can do."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_service import live_service, until
from load import chat, closed_loop, open_loop, percentile, written_down

from serve.bench import arrivals
from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

PLACES, QUEUE, DEADLINE = 4, 8, 60.0
TOKENS = 300
"""Of each answer, so that what the service can do is decided by the model and not by the machine's HTTP."""
SECONDS = 30.0


def test_ten_times_too_much(
    endless_bundle: Path, tiny: Recipe, ray_cluster: None, record_property: Callable[[str, object], None]
) -> None:
    """Ten times the capacity, at random: all is answered or refused in time, refusals at once, and it passes."""
    limits = {"max_ongoing_requests": PLACES, "max_queued_requests": QUEUE}
    language = tiny.serving.language.model_copy(update={**limits, "batch": PLACES})
    # Spoken answers pass the vocoder first: with its own limits the gateway refuses, without asking anybody.
    vocoder = tiny.serving.vocoder.model_copy(update=limits)
    ask = chat("endless", spoken=True, stream=True, tokens=TOKENS)
    serving = {"language": language, "vocoder": vocoder, "request_timeout_seconds": DEADLINE}
    with live_service(endless_bundle, tiny, **serving) as service:
        end = time.monotonic() + SECONDS
        alone = asyncio.run(closed_loop(service.url, [ask], PLACES, lambda: time.monotonic() < end, DEADLINE))
        assert all(answer.good for answer in alone), written_down(alone)
        capacity = len(alone) / (max(answer.ended for answer in alone) - min(answer.began for answer in alone))
        rate = 10 * capacity
        moments = arrivals(int(rate * SECONDS), rate, seed=1)
        answers = asyncio.run(open_loop(service.url, [ask], moments, DEADLINE + 10))
        began = time.monotonic()
        [next_one] = asyncio.run(open_loop(service.url, [ask], [0.0], DEADLINE + 10))
        recovery = time.monotonic() - began
        assert until(lambda: not any(service.ongoing().values()), 30), service.ongoing()
    good = [answer.taken for answer in answers if answer.good]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    record_property("answers a second alone", round(capacity, 2))
    record_property("arrivals a second", round(rate, 2))
    record_property("answers", written_down(answers))
    record_property("seconds until refused, p50 p95 max", _three([answer.taken for answer in refused]))
    record_property("seconds until answered, p50 p95 max", _three(good))
    record_property("seconds of the first answer afterwards", round(recovery, 2))
    assert len(good) + len(refused) == len(answers), [answer for answer in answers if answer.status not in (200, 429)][
        :5
    ]
    assert all(answer.retryable for answer in refused)
    assert max(good) < DEADLINE
    # As many as it can do, in spite of the crowd.
    assert len(good) >= 0.7 * capacity * SECONDS
    assert percentile([answer.taken for answer in refused], 95) < 0.25
    assert next_one.good and recovery < 3 * percentile([answer.taken for answer in alone], 95)


def _three(values: list[float]) -> list[float]:
    return [percentile(values, share) for share in (50, 95, 100)]
