"""What stands before Ray's own HTTP proxy: it obeys headers, holds bodies and words errors before the gateway does."""

import asyncio
import contextlib
import os
import random
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import FULL_HEADER, ApiError, body_too_large, from_proxy
from serve.meters import DoorMeters
from serve.surge import Surge
from speechgpt.runtime.proxies import MAX_BODY_VARIABLE, TRACE_SHARE_VARIABLE

BUNDLE_HEADER = "x-speechgpt-bundle"
"""Digest of the bundle that answered; on everything that the gateway says."""
_DEFAULT_MAX_BODY_BYTES = 15 * 1024 * 1024
_OVERRIDES = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "x-session-id",
)
_WORK = ("/chat/completions", "/audio/speech", "/audio/transcriptions")
_NO_DEADLINE = (b"x-request-timeout-seconds", b"0")
"""Tells the proxy that a session ends when the gateway says so."""
_SESSION_BYTES_A_SECOND = 2 * 1024 * 1024
"""Thirty times what speech in base64 takes; whoever sends faster waits."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 * 1024 * 1024
"""How far what is refused before it is read is read on, and thrown away."""
_WELL_FORMED = {
    "x-request-id": re.compile(r"[A-Za-z0-9._-]{1,64}"),
    "traceparent": re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"),
}


class Edge:
    """ASGI middleware of Ray's own HTTP proxy.

    Takes away the headers by which a client would override the server's policy (deadline, cancellation on disconnect,
    routing), replaces malformed ids of requests and traces, hides the proxy's list of routes, words the proxy's own
    errors, which would show exceptions, as the API's, refuses a crowd for which there is no room (see `Surge`), and
    ends a body above `max_bytes`: the proxy takes what comes at once, however slowly a gateway replica reads.

    trace_share: of the requests that come in no trace, those of which spans are to be kept. It is decided here because
    Ray's spans and FastAPI's meet in the header `traceparent` alone. rejected: told the status of each refusal of which
    no gateway knows.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = _DEFAULT_MAX_BODY_BYTES,
        trace_share: float = 0.0,
        rejected: Callable[[int], None] = lambda status: None,
    ) -> None:
        self.app = app
        self.rejected = rejected
        self.max_bytes = max_bytes
        self.trace_share = trace_share
        self._surges = {route: Surge() for route in _WORK}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _harmless(name, value)]}
        if self.trace_share and b"traceparent" not in dict(scope["headers"]):
            scope["headers"].append((b"traceparent", traceparent(self.trace_share)))
        if scope["path"] == "/-/routes":
            refusal = ApiError(404, "Not Found", code="unknown_url")
            await refusal.response()(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._session(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            self.rejected(413)
            await _early(body_too_large(self.max_bytes), scope, receive, send)
            return
        surge = self._surge(scope)
        if surge and (retry_after := surge.refusal()):
            self.rejected(429)
            await _early(from_proxy(429, retry_after), scope, receive, send)
            return
        received = 0
        replaced = started = False
        refused = False

        async def counted() -> Message:
            nonlocal received, replaced
            message = await receive()
            received += len(message.get("body", b""))
            if received <= self.max_bytes:
                return message
            if not started and not replaced:
                replaced = True
                self.rejected(413)
                await _early(body_too_large(self.max_bytes), scope, receive, send)
            # Whoever sends too much is as good as gone: the proxy drops what it has and cancels the call.
            return {"type": "http.disconnect"}

        async def reworded(message: Message) -> None:
            nonlocal replaced, started, refused
            if not replaced and message["type"] == "http.response.start" and message["status"] >= 400:
                refused = True
                headers = Headers(raw=message["headers"])
                if surge and message["status"] == 429 and (FULL_HEADER in headers or BUNDLE_HEADER not in headers):
                    surge.refused(headers.get("retry-after"))
                if BUNDLE_HEADER not in headers:
                    replaced = True
                    self.rejected(message["status"])
                    await from_proxy(message["status"], headers.get("retry-after")).response()(scope, receive, send)
            if not replaced:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, reworded)
        finally:
            if surge and not refused:
                surge.ended()

    def _surge(self, scope: Scope) -> Surge | None:
        """Of what makes the service work; other routes are answered by the gateway alone. Each route for itself: they
        need different parts of the service, of which one may be full."""
        if scope["method"] != "POST":
            return None
        return next((surge for route, surge in self._surges.items() if scope["path"].endswith(route)), None)

    async def _session(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket: the proxy would end it as it ends a request, after a time; would answer it as a request before
        it is open; would close it, as if all were well, when the gateway's replica is lost; and holds all that a client
        sends until the replica takes it."""
        scope = {**scope, "headers": [*scope["headers"], _NO_DEADLINE]}
        state = "asked"
        pace = Pace(_SESSION_BYTES_A_SECOND, self.max_bytes)

        async def paced() -> Message:
            nonlocal state
            message = await receive()
            if message["type"] == "websocket.disconnect":
                state = "over"
            await asyncio.sleep(pace.wait(len(message.get("bytes") or message.get("text") or "")))
            return message

        async def watched(message: Message) -> None:
            nonlocal state
            match message["type"]:
                case "http.response.start":
                    if state == "asked":
                        state = "over"
                        self.rejected(message["status"])
                        retry_after = Headers(raw=message["headers"]).get("retry-after")
                        await _refuse(from_proxy(message["status"], retry_after), scope, receive, send)
                    return
                case "http.response.body":
                    return
                case "websocket.accept":
                    state = "open"
                case "websocket.close" | "websocket.http.response.start":
                    state = "over"
            await send(message)

        await self.app(scope, paced, watched)
        if state == "open":
            reason = "a part of the service was lost; connect again"
            # The client may be gone, and nobody have noticed.
            with contextlib.suppress(RuntimeError, OSError):
                await send({"type": "websocket.close", "code": 1012, "reason": reason})
        elif state == "asked":
            self.rejected(503)
            await _refuse(from_proxy(503, None), scope, receive, send)


async def _early(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses before the body is read, and reads on for a moment: a client whose connection is closed while it sends
    loses the reply with it, takes the service for broken, and sends it all again."""

    async def unended(message: Message) -> None:
        more = {"more_body": True} if message["type"] == "http.response.body" else {}
        await send({**message, **more})

    await error.response()(scope, receive, unended)
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0 and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                left -= len(message["body"])
    await send({"type": "http.response.body", "body": b""})


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    with contextlib.suppress(RuntimeError, OSError):
        if "websocket.http.response" in scope.get("extensions", {}):
            await error.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013, "reason": error.message})


class Pace:
    """A bucket that lets `burst` bytes through at once and `rate` bytes a second for ever."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at = float(burst), clock()

    def wait(self, size: int) -> float:
        """Seconds to wait after so many bytes more."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - size
        self._at = now
        return max(0.0, -self._level / self._rate)


def _harmless(name: bytes, value: bytes) -> bool:
    key = name.decode("latin-1").lower().replace("_", "-")
    if key in _WELL_FORMED:
        return _WELL_FORMED[key].fullmatch(value.decode("latin-1")) is not None
    return key not in _OVERRIDES


def proxy_middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names (Ray calls it in each HTTP proxy)."""
    most, share = os.environ.get(MAX_BODY_VARIABLE, _DEFAULT_MAX_BODY_BYTES), os.environ.get(TRACE_SHARE_VARIABLE, 0)
    return [Middleware(Edge, max_bytes=int(most), trace_share=float(share), rejected=DoorMeters().rejected)]


def traceparent(share: float) -> bytes:
    """W3C's header of a new trace, sampled with probability `share`."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if random.random() < share else '00'}".encode()
