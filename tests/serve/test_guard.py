"""What every request passes before a route sees it, and what Ray's proxy is kept from doing."""

import asyncio
import base64
import json
import logging
import re
import threading
import time
import zlib
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from own_limits import OwnLimits
from ray.exceptions import TaskCancelledError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from serve import guard, visits
from serve.edge import BUNDLE_HEADER, Edge, Pace
from serve.guard import SUBPROTOCOL, ApiKey, BodyLimit, Guard
from serve.keys import Allowance, KeyFile, KeyRing, hash_key, new_key

KEY = "sk-secret"


async def answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse("secret")


async def echo_length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def slow(request: Request) -> PlainTextResponse:
    await asyncio.sleep(60)
    return PlainTextResponse("late")


async def broken(request: Request) -> PlainTextResponse:
    raise RuntimeError("password of the database: hunter2")


async def costly(request: Request) -> PlainTextResponse:
    visits.current().heard(2.0)
    visits.current().spent(30)
    return PlainTextResponse("done")


async def session(socket: WebSocket) -> None:
    """Says each message's length; each is an answer of its own."""
    await socket.accept()
    try:
        while True:
            length = len(await socket.receive_bytes())
            await visits.current().turn()
            await socket.send_text(str(length))
    except WebSocketDisconnect:
        return


ROUTES = [
    Route("/healthz", answer),
    Route("/readyz", answer),
    Route("/", answer),
    Route("/v1/models", answer),
    Route("/v1/audio/transcriptions", echo_length, methods=["POST"]),
    Route("/slow", slow),
    Route("/broken", broken),
    Route("/costly", costly),
    WebSocketRoute("/v1/realtime", session),
]


@pytest.fixture
def guarded() -> TestClient:
    return TestClient(
        Starlette(
            routes=ROUTES,
            middleware=[
                Middleware(Guard, bundle=lambda: "digest", deadline_seconds=0.5),
                Middleware(ApiKey, keys=KeyRing("", hash_key(KEY), 1), limits=OwnLimits(), lease_seconds=1),
                Middleware(BodyLimit, max_bytes=1000),
            ],
        )
    )


def bearer(key: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/audio/transcriptions", "/nowhere", "/openapi.json", "/metrics"]
)
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("sk-other"), bearer(""), {"authorization": KEY}, basic("wrong"), {"authorization": "Basic %%"}],
    ids=["none", "other", "empty", "bare", "basic", "garbled"],
)
def test_everything_is_closed_without_the_key(guarded: TestClient, path: str, headers: dict[str, str]) -> None:
    reply = guarded.get(path, headers=headers)
    assert reply.status_code == 401 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers[BUNDLE_HEADER] == "digest"


def test_probes_are_open(guarded: TestClient) -> None:
    assert guarded.get("/healthz").text == guarded.get("/readyz").text == "secret"


def test_the_key_opens(guarded: TestClient) -> None:
    assert guarded.get("/v1/models", headers=bearer()).text == "secret"
    assert guarded.get("/", headers=basic(KEY)).text == "secret"


def test_another_site_cannot_use_the_browsers_key(guarded: TestClient) -> None:
    assert guarded.get("/v1/models", headers=basic(KEY) | {"sec-fetch-site": "cross-site"}).status_code == 401
    assert guarded.get("/v1/models", headers=basic(KEY) | {"sec-fetch-site": "same-origin"}).status_code == 200
    # Without TLS a browser tells where a page came from by its origin alone.
    for origin, status in (("http://elsewhere.example", 401), ("null", 401), ("http://testserver", 200)):
        assert guarded.get("/v1/models", headers=basic(KEY) | {"origin": origin}).status_code == status
    with (
        pytest.raises(WebSocketDenialResponse),
        guarded.websocket_connect("/v1/realtime", headers=basic(KEY) | {"origin": "http://elsewhere.example"}),
    ):
        pass


def test_the_body_limit_is_exact(guarded: TestClient) -> None:
    path = "/v1/audio/transcriptions"
    assert guarded.post(path, content=b"x" * 1000, headers=bearer()).text == "1000"
    assert guarded.post(path, content=b"x" * 1001, headers=bearer()).status_code == 413
    chunks = (b"x" * 100 for _ in range(11))
    reply = guarded.post(path, content=chunks, headers=bearer())
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"


def test_the_declared_length_is_refused_unread() -> None:
    async def request() -> list[int]:
        statuses: list[int] = []

        async def receive() -> dict[str, object]:
            raise AssertionError("the body was read")

        async def send(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(int(str(message["status"])))

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"99999999999")]}
        app = Guard(BodyLimit(Starlette(), max_bytes=1000), bundle=lambda: "digest", deadline_seconds=1)
        await app(scope, receive, send)  # type: ignore[arg-type]
        return statuses

    assert asyncio.run(request()) == [413]


def test_the_deadline_ends_a_request(guarded: TestClient) -> None:
    reply = guarded.get("/slow", headers=bearer())
    assert reply.status_code == 504 and reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"]["code"] == "deadline_exceeded"


def test_a_defect_says_nothing_of_the_inside(guarded: TestClient) -> None:
    reply = guarded.get("/broken", headers=bearer())
    assert reply.status_code == 500 and "hunter2" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"


def keyed(file: Path, allowance: Allowance, refresh_seconds: float = 0.0) -> tuple[TestClient, str]:
    """A service with one key in a file, and that key."""
    key, kept = new_key("tester", allowance, time.time())
    file.write_text(KeyFile(keys=(kept,)).model_dump_json())
    limited = Middleware(ApiKey, keys=KeyRing(str(file), None, refresh_seconds), limits=OwnLimits(), lease_seconds=60)
    guard = Middleware(Guard, bundle=lambda: "digest", deadline_seconds=5)
    return TestClient(Starlette(routes=ROUTES, middleware=[guard, limited, Middleware(BodyLimit, max_bytes=1000)])), key


def test_a_rate_is_held_and_says_when_to_come_back(tmp_path: Path) -> None:
    """Row 6: rate."""
    client, key = keyed(tmp_path / "keys.json", Allowance(requests_per_minute=3))
    replies = [client.get("/v1/models", headers=bearer(key)) for _ in range(5)]
    assert [reply.status_code for reply in replies] == [200] * 3 + [429] * 2
    assert replies[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 20 and "x-should-retry" not in replies[-1].headers
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("allowance", [Allowance(audio_seconds_per_day=2), Allowance(tokens_per_day=30)])
def test_a_spent_quota_is_not_worth_a_retry(tmp_path: Path, allowance: Allowance) -> None:
    """Row 6: quotas of audio seconds and tokens."""
    client, key = keyed(tmp_path / "keys.json", allowance)
    assert client.get("/costly", headers=bearer(key)).status_code == 200
    reply = client.get("/costly", headers=bearer(key))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "insufficient_quota")
    assert reply.headers["x-should-retry"] == "false" and 1 <= int(reply.headers["retry-after"]) <= 86_400


def test_sessions_of_a_key_are_counted(tmp_path: Path) -> None:
    """Row 6: sessions per key, and answers within one."""
    client, key = keyed(tmp_path / "keys.json", Allowance(concurrent_requests=1, requests_per_minute=3))
    with client.websocket_connect("/v1/realtime", headers=bearer(key)) as socket:
        reply = client.get("/v1/models", headers=bearer(key))
        assert reply.status_code == 429 and "1 concurrent requests" in reply.json()["error"]["message"]
        for _ in range(2):
            socket.send_bytes(b"12345")
            assert socket.receive_text() == "5"
        socket.send_bytes(b"12345")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1013 and "requests per minute" in closed.value.reason
    # The place is free again; the rate is what refuses now.
    assert "per minute" in client.get("/v1/models", headers=bearer(key)).json()["error"]["message"]


def test_keys_change_under_a_running_service(tmp_path: Path) -> None:
    """Row 1: rotation, expiry and revocation without a restart."""
    file = tmp_path / "keys.json"
    client, old = keyed(file, Allowance())
    new, kept = new_key("next", Allowance(), time.time())
    assert client.get("/", headers=bearer(new)).status_code == 401
    [before] = KeyFile.model_validate_json(file.read_text()).keys
    file.write_text(KeyFile(keys=(before, kept)).model_dump_json())
    assert [client.get("/", headers=bearer(key)).status_code for key in (old, new)] == [200, 200]
    revoked = before.model_copy(update={"revoked": 1})
    file.write_text(KeyFile(keys=(revoked, kept.model_copy(update={"expires": 1}))).model_dump_json())
    assert [client.get("/", headers=bearer(key)).status_code for key in (old, new)] == [401, 401]


def test_a_session_needs_the_key(guarded: TestClient) -> None:
    """Row 1: WebSockets."""
    for headers in ({}, bearer("sk-other"), {"sec-websocket-protocol": f"realtime, {SUBPROTOCOL}sk-other"}):
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            guarded.websocket_connect("/v1/realtime", headers=headers),
        ):
            pass
        assert denied.value.status_code == 401 and denied.value.json()["error"]["code"] == "invalid_api_key"
    offered = f"realtime, {SUBPROTOCOL}{KEY}"
    with guarded.websocket_connect("/v1/realtime", headers={"sec-websocket-protocol": offered}) as socket:
        socket.send_bytes(b"123")
        assert socket.receive_text() == "3"


def test_a_session_ends_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 1: a key that is revoked opens nothing, and keeps nothing open."""
    monkeypatch.setattr(guard, "_LOOKED_AT_SECONDS", 0.05)
    file = tmp_path / "keys.json"
    client, token = keyed(file, Allowance())
    [key] = KeyFile.model_validate_json(file.read_text()).keys
    with client.websocket_connect("/v1/realtime", headers=bearer(token)) as socket:
        socket.send_bytes(b"123")
        assert socket.receive_text() == "3"
        file.write_text(KeyFile(keys=(key.model_copy(update={"revoked": 1}),)).model_dump_json())
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
    assert closed.value.code == 3000


def test_a_message_above_the_limit_closes_the_session(guarded: TestClient) -> None:
    """Row 2: WebSocket frames."""
    with guarded.websocket_connect("/v1/realtime", headers=bearer()) as socket:
        socket.send_bytes(b"x" * 1000)
        assert socket.receive_text() == "1000"
        socket.send_bytes(b"x" * 1001)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1009


def test_compressed_bodies_are_refused(guarded: TestClient) -> None:
    """Row 2: a body whose length says nothing of what it becomes."""
    bomb = zlib.compress(b"0" * 500_000)
    assert len(bomb) < 1000
    for encoding in ("gzip", "deflate", "br", "identity, gzip"):
        reply = guarded.post(
            "/v1/audio/transcriptions", content=bomb, headers=bearer() | {"content-encoding": encoding}
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_the_audit_log_has_no_content(guarded: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Row 13, and item 5: who, what, how long and how much; nothing of what was said, not even by way of a URL."""
    with caplog.at_level(logging.INFO, "ray.serve"):
        guarded.get("/costly?text=mysecretwords", headers=bearer() | {"x-request-id": "trace-1"})
        guarded.get("/mysecretwords", headers=bearer("sk-mysecretwords"))
        guarded.get("/broken", headers=bearer())
        guarded.get("/slow", headers=bearer())
    lines = [json.loads(record.message) for record in caplog.records if record.name == "ray.serve.audit"]
    assert lines[0] == {
        "audit": "request",
        "request_id": "trace-1",
        "key": "0" * 12,
        "route": lines[0]["route"],
        "status": 200,
        "seconds": lines[0]["seconds"],
        "audio_seconds": 2.0,
        "tokens": 30,
    }
    assert [line["status"] for line in lines] == [200, 401, 500, 504]
    assert lines[1]["key"] is None
    assert "RuntimeError" in caplog.text and "test_guard.py" in caplog.text
    for secret in ("mysecretwords", "hunter2", KEY, hash_key(KEY)):
        assert secret not in caplog.text


async def headers_seen(request: Request) -> JSONResponse:
    return JSONResponse(dict(request.headers), headers={BUNDLE_HEADER: "digest"})


async def proxy_failure(request: Request) -> PlainTextResponse:
    status = int(request.query_params["status"])
    return PlainTextResponse("RayTaskError: /root/secret/path", status, {"retry-after": "3"})


@pytest.fixture
def edge() -> TestClient:
    routes = [Route("/seen", headers_seen), Route("/fails", proxy_failure), Route("/-/routes", answer)]
    return TestClient(Edge(Starlette(routes=routes)))


def test_the_edge_takes_away_what_overrides_policy(edge: TestClient) -> None:
    sent = {
        "X-Request-Timeout-Seconds": "0",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "other",
        "x-session-id": "sticky",
        "x-request-id": "forged\tid",
        "x-kept": "1",
    }
    seen = edge.get("/seen", headers=sent).json()
    assert seen["x-kept"] == "1" and not {name.lower() for name in sent} - {"x-kept"} & set(seen)
    assert edge.get("/seen", headers={"x-request-id": "trace-1"}).json()["x-request-id"] == "trace-1"


def test_the_edge_begins_a_trace_or_leaves_it_to_whoever_asks() -> None:
    def seen(share: float, **sent: str) -> str | None:
        client = TestClient(Edge(Starlette(routes=[Route("/seen", headers_seen)]), trace_share=share))
        return client.get("/seen", headers=sent).json().get("traceparent")

    theirs = f"00-{'a' * 32}-{'b' * 16}-00"
    assert seen(0.0) is None
    assert seen(1.0, traceparent=theirs) == theirs
    for sent in ({}, {"traceparent": "00-x"}, {"traceparent": f"00-{'0' * 32}-{'b' * 16}-01"}):
        made = [seen(1.0, **sent) for _ in range(2)]
        assert made[0] != made[1] and all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", one or "") for one in made)
    shares = [str(seen(0.3))[-2:] for _ in range(60)]
    assert {"00", "01"} == set(shares)


def test_the_edge_hides_routes(edge: TestClient) -> None:
    assert edge.get("/-/routes").status_code == 404


@pytest.mark.parametrize(("status", "told"), [(429, 429), (408, 504), (500, 503), (503, 503)])
def test_the_edge_words_the_proxys_own_errors(edge: TestClient, status: int, told: int) -> None:
    reply = edge.get("/fails", params={"status": status})
    assert reply.status_code == told and "secret" not in reply.text
    assert reply.json()["error"]["message"]
    assert (reply.headers.get("retry-after") == "3") == (status == 429)


def test_a_client_that_has_gone_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Ray's proxy raises its own error in whoever reads on from it."""
    sent: list[Message] = []

    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        raise TaskCancelledError

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Guard(gone, bundle=lambda: "digest", deadline_seconds=1)(scope, receive, send))
    assert sent == [] and "request failed" not in caplog.text


def test_the_edge_takes_no_more_than_a_body_may_have() -> None:
    """Row 2: before anything is held; whatever the gateway behind it does."""
    taken: list[int] = []

    async def hungry(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request":
            taken.append(len(message["body"]))
            if not message.get("more_body"):
                break

    def status(headers: list[tuple[bytes, bytes]]) -> int:
        sent: list[Message] = []
        read_on = 0

        async def receive() -> Message:
            nonlocal read_on
            # Without end, as whoever wants to fill a memory sends.
            read_on += 100 if sent else 0
            return {"type": "http.request", "body": b"x" * 100, "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        counted: list[int] = []
        asyncio.run(Edge(hungry, max_bytes=1000, rejected=counted.append)(scope, receive, send))
        assert counted == [413]
        start, refusal, end = sent
        assert json.loads(refusal["body"])["error"]["code"] == "request_too_large" and refusal["more_body"]
        assert end == {"type": "http.response.body", "body": b""} and 0 < read_on < 17 << 20
        return start["status"]

    assert (status([(b"transfer-encoding", b"chunked")]), sum(taken)) == (413, 1000)
    taken.clear()
    for length in (b"1001", b"-1", b"99999999999999999999"):
        assert (status([(b"content-length", length)]), taken) == (413, [])


def test_a_client_that_sends_too_much_is_told_so() -> None:
    """By a real server: one that closes on what it has not read leaves most clients with a broken connection."""
    config = uvicorn.Config(Edge(_never, max_bytes=1000), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]

        async def post() -> list[int]:
            statuses = []
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
                for _ in range(40):
                    form = aiohttp.FormData()
                    form.add_field("file", bytes(3_000_000), filename="a.wav")
                    async with client.post(f"http://127.0.0.1:{port}/", data=form) as reply:
                        statuses.append(reply.status)
            return statuses

        assert asyncio.run(post()) == [413] * 40
    finally:
        server.should_exit = True
        thread.join()


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nothing reaches the gateway")


def a_session(app: object) -> TestClient:
    return TestClient(Edge(app))  # type: ignore[arg-type]


def test_the_proxy_gives_a_session_no_deadline() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-timeout-seconds")
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})

    headers = {"x-request-timeout-seconds": "0.001"}
    with a_session(app).websocket_connect("/v1/realtime", headers=headers) as socket:
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1000
    assert seen == [b"0"]


@pytest.mark.parametrize(("status", "told"), [(429, 429), (503, 503), (None, 503)])
def test_the_proxys_own_refusal_reaches_a_session(status: int | None, told: int) -> None:
    """Before it is open: as a whole reply, not as the HTTP that a WebSocket cannot carry; also when nothing came."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if status:
            await PlainTextResponse("RayTaskError: /root/secret/path", status, {"retry-after": "3"})(
                {"type": "http"}, receive, send
            )

    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        a_session(app).websocket_connect("/v1/realtime"),
    ):
        pass
    assert denied.value.status_code == told and "secret" not in denied.value.text
    assert denied.value.json()["error"]["code"] in ("at_capacity", "unavailable")


def test_a_session_whose_replica_is_lost_is_told_to_come_back() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})

    with a_session(app).websocket_connect("/v1/realtime") as socket:
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1012


def test_whoever_sends_faster_than_anybody_speaks_waits() -> None:
    now = 0.0
    pace = Pace(rate=100, burst=1000, clock=lambda: now)
    assert [pace.wait(500), pace.wait(500), pace.wait(50)] == [0, 0, 0.5]
    now = 100.0
    assert pace.wait(1000) == 0 and pace.wait(100) == 1
