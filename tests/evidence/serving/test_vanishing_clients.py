"""Row 7 of the matrix, under load: clients who vanish take nothing with them and leave nothing behind."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_clients import as_form, as_json, moments, vanish
from live_service import live_service, until
from load import QUESTION

from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

MARGIN = 24 << 20
"""Bytes by which a replica may be larger after as many clients again: allocators and caches take their time."""


def test_500_clients_that_vanish(
    endless_bundle: Path, tiny: Recipe, ray_cluster: None, clip: bytes, record_property: Callable[[str, object], None]
) -> None:
    """500 clients gone at random moments: within 5 s nothing is worked on; the second 250 leave memory as it was."""
    language = tiny.serving.language.model_copy(
        update={"max_ongoing_requests": 8, "max_queued_requests": 32, "batch": 8}
    )
    asked = {"model": "endless", "messages": [{"role": "user", "content": QUESTION}]}
    spoken = asked | {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    reading = {"model": "endless", "voice": "alloy", "input": "hello", "response_format": "pcm"}
    requests = [
        as_json("/v1/chat/completions", spoken | {"stream": True}),
        as_json("/v1/chat/completions", asked | {"stream": True}),
        as_json("/v1/chat/completions", spoken),
        as_form("/v1/audio/transcriptions", {"model": "endless"}, clip),
        as_json("/v1/audio/speech", reading),
    ]
    generation = tiny.generation.model_copy(update={"max_new_tokens": 1 << 20})
    chosen = tiny.model_copy(update={"generation": generation})
    with live_service(endless_bundle, chosen, language=language) as service:
        watched = service.replicas()
        sizes: list[dict[str, int]] = []
        idle_after = []
        for half in range(2):
            vanish(service.url, moments(requests, 250, seed=half), at_once=16)
            began = time.monotonic()
            assert until(lambda: not any(service.ongoing().values()), 60, 0.1), service.ongoing()
            idle_after.append(round(time.monotonic() - began, 2))
            sizes.append({replica.deployment: replica.rss() for replica in watched})
        assert [replica.pid for replica in service.replicas()] == [replica.pid for replica in watched]
    grown = {name: sizes[1][name] - sizes[0][name] for name in sizes[0]}
    record_property("seconds until nothing was worked on, after each 250", idle_after)
    record_property("MiB after 250", {name: size >> 20 for name, size in sizes[0].items()})
    record_property("MiB more after 500", {name: round(size / (1 << 20), 1) for name, size in grown.items()})
    assert max(idle_after) < 5
    assert max(grown.values()) <= MARGIN, grown
