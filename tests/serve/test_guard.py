"""What every request passes before a route sees it, and what Ray's proxy is kept from doing."""

import asyncio
import base64

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.guard import BUNDLE_HEADER, ApiKey, BodyLimit, Edge, Guard, hash_key

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


ROUTES = [
    Route("/healthz", answer),
    Route("/readyz", answer),
    Route("/", answer),
    Route("/v1/models", answer),
    Route("/v1/audio/transcriptions", echo_length, methods=["POST"]),
    Route("/slow", slow),
    Route("/broken", broken),
]


@pytest.fixture
def guarded() -> TestClient:
    return TestClient(
        Starlette(
            routes=ROUTES,
            middleware=[
                Middleware(Guard, bundle=lambda: "digest", deadline_seconds=0.5),
                Middleware(ApiKey, key_hash=hash_key(KEY)),
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


def test_the_edge_hides_routes(edge: TestClient) -> None:
    assert edge.get("/-/routes").status_code == 404


@pytest.mark.parametrize(("status", "told"), [(429, 429), (408, 504), (500, 503), (503, 503)])
def test_the_edge_words_the_proxys_own_errors(edge: TestClient, status: int, told: int) -> None:
    reply = edge.get("/fails", params={"status": status})
    assert reply.status_code == told and "secret" not in reply.text
    assert reply.json()["error"]["message"]
    assert (reply.headers.get("retry-after") == "3") == (status == 429)
