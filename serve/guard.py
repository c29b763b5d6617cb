"""What every request and session passes before a route sees it: identity of the reply, deadline, key, limits, log."""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPMethod

from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import visits
from serve.edge import BUNDLE_HEADER
from serve.errors import ApiError, body_too_large, deadline_passed, described
from serve.keys import Key, KeyRing
from serve.limits import Counting, Refusal
from serve.visits import Visit

OPEN_ROUTES = ("/healthz", "/readyz")
"""Answered without a key: an orchestrator's probes carry none."""
SUBPROTOCOL = "openai-insecure-api-key."
"""How OpenAI's browser clients send a key with a WebSocket, which can carry no header of theirs."""
_LOOKED_AT_SECONDS = 2.0
"""How often a session's key is."""
_RENEWAL_SECONDS = 20.0
"""How often a session's place is kept for longer."""
_LAST_WORDS_SECONDS = 1.0
"""How long before the deadline a streamed answer ends itself; a tenth of the deadline, if that is less."""
_METHODS = {*HTTPMethod, "WEBSOCKET"}
_CLOSE_CODES = {401: 3000, 403: 3003, 413: 1009, 429: 1013, 503: 1013, 504: 1013}
"""WebSocket close codes, by HTTP status: unauthorized, forbidden, message too big, try again later."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Ending:
    """Of a visit. route: its template. status: a problem's where there was one, 0 without an answer. gone: the client
    left before the end."""

    route: str
    status: int
    seconds: float
    gone: bool


class Guard:
    """ASGI middleware. Stamps `x-speechgpt-bundle` on every reply, ends a request's work at the deadline, turns
    whatever escapes the routes into an OpenAI error that tells nothing about the inside, and writes the audit log.
    ended: told of each visit that is over.

    A WebSocket session has no deadline here. Until it is accepted it is refused with a whole HTTP reply where the
    server can send one, after that closed with a code.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        bundle: Callable[[], str],
        deadline_seconds: float,
        ended: Callable[[Visit, Ending], None] = lambda visit, ending: None,
    ) -> None:
        self.app = app
        self.bundle = bundle
        self.deadline_seconds = deadline_seconds
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        session = scope["type"] == "websocket"
        visit = Visit("session" if session else "request", Headers(scope=scope).get("x-request-id", ""))
        visits.begin(visit)
        began, status, gone = time.monotonic(), 0, False
        if not session:
            last_words = min(_LAST_WORDS_SECONDS, self.deadline_seconds / 10)
            visit.stream_until = began + self.deadline_seconds - last_words

        async def stamped(message: Message) -> None:
            nonlocal status
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    status = message["status"]
                    MutableHeaders(scope=message).setdefault(BUNDLE_HEADER, self.bundle())
                case "websocket.accept":
                    status = 101
            await send(message)

        problem: ApiError | None = None
        try:
            try:
                async with asyncio.timeout(None if session else self.deadline_seconds):
                    await self.app(scope, receive, stamped)
            except ApiError as error:
                problem = error
            except TimeoutError:
                problem = deadline_passed(self.deadline_seconds)
            except TaskCancelledError:
                # What Ray's proxy raises in whoever reads on from a client that has gone.
                gone = True
            except asyncio.CancelledError:
                gone = True
                raise
            except Exception as error:  # noqa: BLE001 - logged in words of our own
                logger.error("request failed: %s", described(error))
                problem = ApiError(500, "The server failed to answer; its log has the reason.", code="internal_error")
            if problem and session:
                await _refuse(problem, scope, receive, stamped, accepted=status == 101)
            elif problem and not status:
                await problem.response()(scope, receive, stamped)
        finally:
            # The status of a refusal that a server can word as a close code only.
            told = problem.status if problem and not status else status
            route, seconds = _route(scope), time.monotonic() - began
            self.ended(visit, Ending(route, problem.status if problem else status, seconds, gone))
            visits.write_down(visit.audited(route, told, seconds))


async def _refuse(problem: ApiError, scope: Scope, receive: Receive, send: Send, *, accepted: bool) -> None:
    if not accepted and "websocket.http.response" in scope.get("extensions", {}):
        await problem.response()(scope, receive, send)
        return
    # Whoever is gone already cannot be told.
    with contextlib.suppress(RuntimeError):
        await send(
            {"type": "websocket.close", "code": _CLOSE_CODES.get(problem.status, 1011), "reason": problem.message[:120]}
        )


class ApiKey:
    """ASGI middleware. Denies every route but the probes unless the request carries a key: as `Authorization: Bearer`,
    as the password of HTTP Basic (what a browser can send when it opens the page), or in a WebSocket's subprotocols.
    Counts what the key uses and refuses what it may not.

    lease_seconds: after so long a request counts as over, whatever became of its replica.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, limits: Counting, lease_seconds: float) -> None:
        self.app = app
        self.keys = keys
        self.limits = limits
        self.lease_seconds = lease_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _path(scope) in OPEN_ROUTES):
            await self.app(scope, receive, send)
            return
        key = await self.keys.find(_token(Headers(scope=scope)))
        if key is None:
            raise _unknown_key()
        visit = visits.current()
        visit.key = key.id
        lasting = scope["type"] == "websocket"
        async with self._counted(key, visit, lasting=lasting):
            if lasting:
                await self._while_valid(_token(Headers(scope=scope)), self.app(scope, receive, send))
            else:
                await self.app(scope, receive, send)

    async def _while_valid(self, token: str, session: Awaitable[None]) -> None:
        """Raises ApiError, 401, when its key opens nothing any more."""
        going_on = asyncio.ensure_future(session)
        try:
            while not (await asyncio.wait({going_on}, timeout=_LOOKED_AT_SECONDS))[0]:
                if await self.keys.find(token) is None:
                    raise _unknown_key()
            await going_on
        finally:
            going_on.cancel()
            await asyncio.wait({going_on})

    @contextlib.asynccontextmanager
    async def _counted(self, key: Key, visit: Visit, *, lasting: bool) -> AsyncIterator[None]:
        if key.allowance.unlimited:
            yield
            return

        async def turn() -> None:
            if refusal := await self.limits.count(key.id, key.allowance):
                raise refusal.told(key.allowance)

        async def quota() -> None:
            if refusal := await self.limits.spent(key.id, key.allowance):
                raise refusal.told(key.allowance)

        async def keep() -> None:
            while True:
                await asyncio.sleep(_RENEWAL_SECONDS)
                self.limits.renew(key.id, lease, self.lease_seconds)

        entered = await self.limits.enter(key.id, key.allowance, self.lease_seconds)
        if isinstance(entered, Refusal):
            raise entered.told(key.allowance)
        lease, visit.turn, visit.quota = entered, turn, quota
        visit.charge = partial(self.limits.charge, key.id)
        renewal = asyncio.create_task(keep()) if lasting else None
        try:
            yield
        finally:
            if renewal:
                renewal.cancel()
            self.limits.leave(key.id, lease)


def _unknown_key() -> ApiError:
    return ApiError(401, "A valid API key is required: Authorization: Bearer KEY.", code="invalid_api_key")


def _token(headers: Headers) -> str:
    """The key that a request carries; "" for none."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        # Browsers add Basic credentials by themselves, also to requests that another site makes them send.
        if _of_another_site(headers):
            return ""
        try:
            return base64.b64decode(credentials, validate=True).decode().partition(":")[2].strip()
        except ValueError:
            return ""
    offered = (name.strip() for name in headers.get("sec-websocket-protocol", "").split(","))
    return next((name.removeprefix(SUBPROTOCOL) for name in offered if name.startswith(SUBPROTOCOL)), "")


def _of_another_site(headers: Headers) -> bool:
    """Whether a browser says so; to addresses without TLS it does not send `Sec-Fetch-Site`."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


class BodyLimit:
    """ASGI middleware. Refuses a body above `max_bytes`, by its Content-Length or, in chunks, as it passes; a
    compressed one, whose length says nothing; and closes a WebSocket that sends a message above it, with code 1009.

    max_message_bytes: of a WebSocket, where it is another."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_message_bytes: int | None = None) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_message_bytes = max_message_bytes or max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._session(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.max_bytes:
            raise body_too_large(self.max_bytes)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "Compressed bodies are not taken: send it as it is.", code="unsupported_encoding")
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise body_too_large(self.max_bytes)
            return message

        async def unless_too_large(message: Message) -> None:
            # The framework makes a 400 of its own of whatever interrupts its reading of a body.
            if received <= self.max_bytes:
                await send(message)

        try:
            await self.app(scope, counted, unless_too_large)
        finally:
            if received > self.max_bytes:
                raise body_too_large(self.max_bytes)

    async def _session(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = False

        async def counted() -> Message:
            nonlocal closed
            message = await receive()
            size = len(message.get("bytes") or b"") or len(message.get("text") or "")
            if size <= self.max_message_bytes:
                return message
            closed = True
            reason = f"a message above {self.max_message_bytes} bytes"
            await send({"type": "websocket.close", "code": 1009, "reason": reason})
            return {"type": "websocket.disconnect", "code": 1009}

        async def until_closed(message: Message) -> None:
            if not closed:
                await send(message)

        await self.app(scope, counted, until_closed)


def _path(scope: Scope) -> str:
    """The path below the route prefix of the application."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _route(scope: Scope) -> str:
    """Method and template of the route that took a request. Of methods that clients make up there is no end: they are
    one, or each would be a row of its own in the metrics."""
    template = getattr(scope.get("route"), "path", "unmatched")
    method = scope.get("method", "WEBSOCKET")
    return f"{method if method in _METHODS else 'OTHER'} {template}"
