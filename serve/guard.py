"""What every request passes before a route sees it: identity of the reply, deadline, API key, body limit."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, deadline_passed, from_proxy

KEY_VARIABLE = "SPEECHGPT_API_KEY"
OPEN_ROUTES = ("/healthz", "/readyz")
"""Answered without a key: an orchestrator's probes carry none."""
BUNDLE_HEADER = "x-speechgpt-bundle"
"""Digest of the bundle that answered; on everything that the gateway says."""
_OVERRIDES = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "x-session-id",
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("ray.serve")


def hash_key(key: str) -> str:
    """The only form in which an API key leaves the process that was given it."""
    return hashlib.sha256(key.encode()).hexdigest()


class Guard:
    """ASGI middleware. Stamps `x-speechgpt-bundle` on every reply, ends work at the deadline, and turns whatever
    escapes the routes into an OpenAI error that tells nothing about the inside."""

    def __init__(self, app: ASGIApp, *, bundle: Callable[[], str], deadline_seconds: float) -> None:
        self.app = app
        self.bundle = bundle
        self.deadline_seconds = deadline_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def stamped(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).setdefault(BUNDLE_HEADER, self.bundle())
            await send(message)

        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self.app(scope, receive, stamped)
        except ApiError as error:
            problem = error
        except TimeoutError:
            problem = deadline_passed(self.deadline_seconds)
        except Exception:
            logger.exception("request failed: %s %s", scope["method"], scope["path"])
            problem = ApiError(500, "The server failed to answer; its log has the reason.", code="internal_error")
        else:
            return
        if not started:
            await problem.response()(scope, receive, stamped)


class ApiKey:
    """ASGI middleware. Denies every route but the probes unless the request carries the key, as `Authorization: Bearer`
    or as the password of HTTP Basic (what a browser can send when it opens the page)."""

    def __init__(self, app: ASGIApp, *, key_hash: str) -> None:
        self.app = app
        self.key_hash = key_hash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or self._allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            raise ApiError(401, "A valid API key is required: Authorization: Bearer KEY.", code="invalid_api_key")

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            # Browsers add Basic credentials by themselves, also to requests that another site makes them send.
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return False
            try:
                credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(hash_key(credentials.strip()), self.key_hash)


class BodyLimit:
    """ASGI middleware. Refuses a body above `max_bytes`, by its Content-Length or, in chunks, as it passes."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            raise self._too_large()
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            return message

        async def unless_too_large(message: Message) -> None:
            # The framework makes a 400 of its own of whatever interrupts its reading of a body.
            if received <= self.max_bytes:
                await send(message)

        try:
            await self.app(scope, counted, unless_too_large)
        finally:
            if received > self.max_bytes:
                raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request's body is above {self.max_bytes} bytes.", code="request_too_large")


class Edge:
    """ASGI middleware of Ray's own HTTP proxy, which obeys some headers before the gateway sees the request, and writes
    some errors that the gateway never sees.

    Takes away the headers by which a client would override the server's policy (deadline, cancellation on disconnect,
    routing), replaces malformed request ids, hides the proxy's list of routes, and words the proxy's own errors, which
    would show exceptions, as the API's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _harmless(name, value)]}
        if scope["path"] == "/-/routes":
            await ApiError(404, "Not Found", code="unknown_url").response()(scope, receive, send)
            return
        replaced = False

        async def reworded(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = Headers(raw=message["headers"])
                replaced = BUNDLE_HEADER not in headers
                if replaced:
                    await from_proxy(message["status"], headers.get("retry-after")).response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, reworded)


def _harmless(name: bytes, value: bytes) -> bool:
    key = name.decode("latin-1").lower().replace("_", "-")
    if key == "x-request-id":
        return _REQUEST_ID.fullmatch(value.decode("latin-1")) is not None
    return key not in _OVERRIDES


def proxy_middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names (Ray calls it in each HTTP proxy)."""
    return [Middleware(Edge)]
