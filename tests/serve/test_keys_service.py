"""Keys and their limits on a real Ray Serve with two replicas of the gateway: rows 1, 6 and 13 of the matrix."""

import base64
import json
import re
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from live_service import LiveService, live_service, session_directory, until
from ray import serve
from ray.serve.schema import ReplicaState
from ray.util import list_named_actors

from serve.guard import SUBPROTOCOL
from serve.keys import Allowance, KeyFile, change, hash_key, new_key
from serve.limits import ACTOR, Limits
from serve.shared import NAMESPACE
from speechgpt.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ALLOWANCES = {
    "free": Allowance(),
    "rated": Allowance(requests_per_minute=6),
    "patient": Allowance(requests_per_minute=20),
    "single": Allowance(concurrent_requests=1),
    "tokens": Allowance(tokens_per_day=1),
    "sound": Allowance(audio_seconds_per_day=0.5),
    "doomed": Allowance(),
    "expired": Allowance(),
}
REFRESH_SECONDS = 1.0
CANARY = "zebrafinch"
"""Stands in whatever a client sends and must stand in no log."""
UNNAMED = ("/", "/metrics", "/openapi.json", "/docs", "/redoc", f"/{CANARY}?q={CANARY}", "//healthz", "/healthz/",
           "/healthz/../metrics", "/HEALTHZ", "/v1/realtime")  # fmt: skip
"""Paths that /openapi.json does not name, or that are spelt otherwise."""


@dataclass(frozen=True)
class Keyed:
    service: LiveService
    file: Path
    keys: dict[str, str]
    ids: dict[str, str]
    limits: Any
    """The actor."""

    def ask(self, key: str, path: str = "/v1/models", **more: Any) -> httpx.Response:
        return httpx.get(self.service.url + path, headers=bearer(self.keys[key]), timeout=60, **more)

    def ask_together(self, key: str) -> list[httpx.Response]:
        """40 requests, 8 at a time: one after another all might go to the replica that seems to hold less."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda _: self.ask(key), range(40)))

    def chat(self, key: str, text: str) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
        address = f"{self.service.url}/v1/chat/completions"
        return httpx.post(address, json=body, headers=bearer(self.keys[key]), timeout=60)

    def transcribe(self, key: str, clip: bytes) -> httpx.Response:
        address = f"{self.service.url}/v1/audio/transcriptions"
        form = {"data": {"model": "tiny"}, "files": {"file": (f"{CANARY}.wav", clip)}}
        return httpx.post(address, headers=bearer(self.keys[key]), timeout=60, **form)

    def replicas_that_answered(self, key: str, *, status: int) -> int:
        """Replicas of the gateway that wrote down such an answer to that key."""
        seen = set()
        for file in (session_directory() / "logs" / "serve").glob("replica_gateway_Gateway_*.log"):
            for line in audited(file):
                if (line["key"], line["status"]) == (self.ids[key], status):
                    seen.add(file.name)
        return len(seen)


def audited(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        if found := re.search(r'\{"audit".*\}', line):
            yield json.loads(found.group())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def late_limits() -> Any:
    """What the gateway's replicas share, in a process that comes up 5 s after one of theirs."""

    def ready() -> int | None:
        deployment = serve.status().applications["gateway"].deployments["Gateway"]
        return deployment.replica_states.get(ReplicaState.RUNNING)

    # Within a function, or the actor would import this module, which only pytest can.
    class Late(Limits):
        def __init__(self) -> None:
            super().__init__()
            while not (gateway := [each for each in list_named_actors(True) if "#Gateway#" in each["name"]]):
                time.sleep(0.1)
            ray.get(ray.get_actor(**gateway[0]).get_num_ongoing_requests.remote())
            end = time.monotonic() + 5
            while not (ready_before := ready()) and time.monotonic() < end:
                time.sleep(0.1)
            self._late = bool(ready_before)

        def late(self) -> bool:
            """Whether a replica of the gateway was there for requests before this."""
            return self._late

    options = {"name": ACTOR, "namespace": NAMESPACE, "lifetime": "detached", "allow_out_of_order_execution": True}
    return ray.remote(Late).options(**options, num_cpus=0).remote()


@pytest.fixture(scope="module")
def keyed(
    tiny_bundle: Path, tiny: Recipe, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    keys, kept = {}, {}
    for name, allowance in ALLOWANCES.items():
        keys[name], kept[name] = new_key(name, allowance, time.time(), -1 if name == "expired" else None)
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(KeyFile(keys=tuple(kept.values())).model_dump_json())
    gateway = tiny.serving.gateway.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    serving = {"gateway": gateway, "keys": str(file), "keys_refresh_seconds": REFRESH_SECONDS}
    limits = late_limits()
    with live_service(tiny_bundle, tiny, **serving) as service:
        assert len(service.replicas("Gateway")) == 2
        yield Keyed(service, file, keys, {name: key.id for name, key in kept.items()}, limits)
    ray.kill(limits)


def wrong_keys(keyed: Keyed) -> list[dict[str, str]]:
    crossed = f"sk-{keyed.ids['free']}-{keyed.keys['rated'].rpartition('-')[2]}"
    basic = base64.b64encode(f"me:{crossed}".encode()).decode()
    return [
        {},
        bearer(f"sk-{CANARY}"),
        bearer(crossed),
        bearer(keyed.keys["expired"]),
        bearer(hash_key(keyed.keys["free"])),
        {"authorization": f"Basic {basic}"},
        {"authorization": keyed.keys["free"]},
        {"api-key": keyed.keys["free"]},
    ]


def test_it_is_ready_once_requests_can_be_counted(keyed: Keyed) -> None:
    assert not ray.get(keyed.limits.late.remote())


def test_every_route_but_the_probes_is_closed(keyed: Keyed, clip: bytes) -> None:
    """Row 1: each route of /openapi.json and the ones it does not name, with a body, multipart, HEAD, unknown ones."""
    schema = keyed.ask("free", "/openapi.json").json()
    wrong = wrong_keys(keyed)
    routes = [(method, path, wrong) for path, methods in schema["paths"].items() for method in methods]
    assert {"/v1/chat/completions", "/v1/audio/speech", "/v1/audio/transcriptions"} <= set(schema["paths"])
    routes += [
        (method, path, wrong[1:3]) for path in UNNAMED for method in ("get", "post", "head", "options", "delete")
    ]
    closed, open_ = set(), set()
    with httpx.Client(base_url=keyed.service.url, timeout=60) as client:
        for method, path, given in routes:
            for headers in given:
                reply = client.request(method, path.replace("{model}", "tiny"), headers=headers)
                (closed if reply.status_code == 401 else open_).add((method, path))
                if reply.status_code == 401 and method != "head":
                    assert reply.json()["error"]["code"] == "invalid_api_key"
        assert open_ == {("get", "/healthz"), ("get", "/readyz")} and not open_ & closed
        assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        for headers in wrong_keys(keyed):
            form = {"data": {"model": "tiny", "prompt": CANARY}, "files": {"file": (f"{CANARY}.wav", clip)}}
            assert client.post("/v1/audio/transcriptions", headers=headers, **form).status_code == 401
    assert keyed.ask("free").status_code == 200


@pytest.mark.parametrize("path", ["/v1/realtime?model=tiny", f"/{CANARY}?q={CANARY}", "/healthz", "/metrics"])
def test_sessions_are_closed_without_a_key(keyed: Keyed, path: str) -> None:
    """Row 1: WebSockets, also on the paths that are open to requests."""
    offers = [{}, {"sec-websocket-protocol": f"realtime, {SUBPROTOCOL}sk-{CANARY}"}, bearer(keyed.keys["expired"])]
    for offer in offers:
        upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
                   "sec-websocket-key": base64.b64encode(secrets.token_bytes(16)).decode()}  # fmt: skip
        assert httpx.get(keyed.service.url + path, headers=upgrade | offer, timeout=60).status_code == 401


def test_a_rate_is_counted_over_both_replicas(keyed: Keyed) -> None:
    """Row 6: rate."""
    began = time.monotonic()
    replies = keyed.ask_together("rated")
    earned = (time.monotonic() - began) * 6 / 60
    passed = [reply for reply in replies if reply.status_code == 200]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(passed) + len(refused) == 40 and 6 <= len(passed) <= 6 + earned + 1
    assert all(1 <= int(reply.headers["retry-after"]) <= 10 for reply in refused)
    assert {reply.json()["error"]["code"] for reply in refused} == {"rate_limit_exceeded"}
    assert keyed.replicas_that_answered("rated", status=429) == 2


def test_the_official_client_waits_as_it_is_told(keyed: Keyed) -> None:
    """Row 6: Retry-After."""
    seen: list[tuple[float, int, float]] = []

    def note(reply: httpx.Response) -> None:
        seen.append((time.monotonic(), reply.status_code, float(reply.headers.get("retry-after", 0))))

    patient = openai.OpenAI(
        base_url=f"{keyed.service.url}/v1",
        api_key=keyed.keys["patient"],
        max_retries=1,
        http_client=openai.DefaultHttpxClient(event_hooks={"response": [note]}),
    )

    def waited() -> bool:
        """Unless there was a place again by the time it came."""
        seen.clear()
        assert until(lambda: keyed.ask("patient").status_code == 429, every=0)
        assert [model.id for model in patient.models.list()] == ["tiny"]
        return len(seen) == 2

    assert until(waited, every=0)
    (refused_at, refused, told), (passed_at, passed, _) = seen
    assert (refused, passed) == (429, 200) and 1 <= told <= passed_at - refused_at


def test_requests_under_way_are_counted_over_both_replicas(keyed: Keyed) -> None:
    """Row 6: places. The first request is held by a body that does not end."""
    host, port = keyed.service.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keyed.keys['single']}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )

    def hold() -> socket.socket | None:
        held = socket.create_connection((host, int(port)))
        held.sendall(head.encode())
        refused = until(lambda: keyed.ask("single").status_code == 429, 10)
        # Nobody answers it: it came in before the others.
        return held if refused else held.close()

    held = until(hold)
    assert held
    with held:
        replies = keyed.ask_together("single")
        assert {reply.status_code for reply in replies} == {429}
        assert "concurrent requests" in replies[0].json()["error"]["message"]
        assert keyed.replicas_that_answered("single", status=429) == 2
    assert until(lambda: keyed.ask("single").status_code == 200), "the place of who went away is not free"


@pytest.mark.parametrize("quota", ["tokens", "sound"])
def test_a_quota_is_counted_over_both_replicas(keyed: Keyed, clip: bytes, quota: str) -> None:
    """Row 6: quotas of tokens and of audio seconds; the request that spends one is answered."""
    first = keyed.chat(quota, CANARY) if quota == "tokens" else keyed.transcribe(quota, clip)
    assert first.status_code == 200, first.text
    assert until(lambda: keyed.ask(quota).status_code == 429)
    replies = keyed.ask_together(quota)
    assert {reply.status_code for reply in replies} == {429}
    assert replies[0].json()["error"]["code"] == "insufficient_quota"
    assert replies[0].headers["x-should-retry"] == "false" and int(replies[0].headers["retry-after"]) > 0
    assert keyed.replicas_that_answered(quota, status=429) == 2


def test_a_revoked_key_is_refused_within_the_refresh_time(keyed: Keyed) -> None:
    """Row 1."""
    assert {reply.status_code for reply in keyed.ask_together("doomed")} == {200}
    assert keyed.replicas_that_answered("doomed", status=200) == 2

    def revoke(found: KeyFile) -> KeyFile:
        return KeyFile(keys=tuple(
            key.model_copy(update={"revoked": int(time.time())}) if key.name == "doomed" else key for key in found.keys
        ))  # fmt: skip

    change(str(keyed.file), revoke)
    time.sleep(REFRESH_SECONDS)
    assert {reply.status_code for reply in keyed.ask_together("doomed")} == {401}
    assert keyed.ask("free").status_code == 200


def test_no_log_holds_what_was_sent_or_said(keyed: Keyed, clip: bytes) -> None:
    """Row 13: keys, their hashes, words, transcripts, sound, file names, paths and queries; in no file of Ray's."""
    headers = bearer(keyed.keys["free"])
    spoken = base64.b64encode(clip).decode()
    part = {"type": "input_audio", "input_audio": {"data": spoken, "format": "wav"}}
    reply = keyed.chat("free", f"what is {CANARY}")
    assert reply.status_code == 200
    words = {reply.json()["choices"][0]["message"]["content"], keyed.transcribe("free", clip).json()["text"]}
    address = keyed.service.url
    for path in (f"/{CANARY}", f"/v1/{CANARY}?text={CANARY}", f"/v1/models/{CANARY}", f"/%7a{CANARY[1:]}?{CANARY}"):
        assert httpx.get(address + path, headers=headers, timeout=60).status_code == 404
        assert httpx.get(address + path, timeout=60).status_code == 401
    for body in (
        {"model": "tiny", "messages": [{"role": "user", "content": [part]}]},
        {"model": CANARY, "messages": [{"role": "user", "content": CANARY}]},
        {"model": "tiny", "messages": [{"role": CANARY, "content": CANARY}]},
        {"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000 + CANARY}]},
        {"model": "tiny", "messages": [{"role": "user", "content": [part | {"input_audio": {"data": CANARY}}]}]},
    ):
        httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)
    httpx.post(f"{address}/v1/audio/speech", content=f'{{"{CANARY}', headers=headers, timeout=60)
    assert httpx.get(f"{address}/-/{CANARY}", headers=headers, timeout=60).status_code == 404
    keyed.transcribe("free", CANARY.encode() * 50)
    assert all(len(word) > 8 for word in words)
    secret = {CANARY, spoken[2000:2060], *words}
    for key in keyed.keys.values():
        secret |= {key, key.split("-", 2)[2], hash_key(key)}
    logs = [file for file in (session_directory() / "logs").rglob("*") if file.is_file()]
    text = {file.relative_to(session_directory()): file.read_bytes() for file in logs}
    leaks = {(str(file), word) for file, content in text.items() for word in secret if word.encode() in content}
    assert not leaks
    assert any(b'"audit"' in content for content in text.values()), "these are not the logs"
