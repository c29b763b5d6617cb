"""Errors as the OpenAI API shapes them: `{"error": {"message", "type", "param", "code"}}`."""

import math
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

FULL_HEADER = "x-speechgpt-full"
"""On a refusal for want of room, which a key's own limit is not."""
_AT_CAPACITY = "The service is at capacity; try again shortly."
_REPLACING = "A part of the service is being replaced; try again shortly."
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told: an HTTP status and OpenAI's four fields. `retry_after`: seconds, sent as a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 504 or self.code == "insufficient_quota":
            # The official clients retry every 429 and 5xx; a request that ran out of time would only do so again, and
            # a quota comes back tomorrow.
            headers["x-should-retry"] = "false"
        if self.code == "at_capacity":
            headers[FULL_HEADER] = "1"
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="speechgpt: any name, the API key as password"'
        return JSONResponse(self.body(), self.status, headers)


def deadline_passed(seconds: float) -> ApiError:
    return ApiError(504, f"The request was not done within {seconds:g} s.", code="deadline_exceeded")


def body_too_large(most: int) -> ApiError:
    return ApiError(413, f"The request's body is above {most} bytes.", code="request_too_large")


def described(error: BaseException) -> str:
    """What went wrong and where, for a log: types and places of the exception and its causes, never their messages,
    in which users' words may stand."""
    lines = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        places = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)
        ]
        lines.append(f"{type(cause).__module__}.{type(cause).__qualname__} at " + " < ".join(reversed(places)))
        cause = cause.__cause__ or cause.__context__
    return "\n  because of ".join(lines)


@dataclass(frozen=True)
class Fault:
    """A deployment that could not take a request, as one that asked for it on another's behalf passes it on.

    A value, because exceptions of Serve's lose their class on the way through two deployments.
    """

    code: Literal["at_capacity", "unavailable"]

    def told(self, retry_after: float) -> ApiError:
        if self.code == "at_capacity":
            return ApiError(429, _AT_CAPACITY, code=self.code, retry_after=retry_after)
        return ApiError(503, _REPLACING, code=self.code, retry_after=retry_after)


def fault_of(error: BaseException) -> Fault | None:
    """None for anything that is a defect of ours."""
    if isinstance(error, BackPressureError):
        return Fault("at_capacity")
    if isinstance(error, (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)):
        return Fault("unavailable")
    return None


def from_serve(error: BaseException, retry_after: float) -> ApiError | None:
    """The client's view of a fault between deployments; None for anything that is a defect of ours."""
    fault = fault_of(error)
    return fault.told(retry_after) if fault else None


def from_proxy(status: int, retry_after: str | None) -> ApiError:
    """What Ray's HTTP proxy answers by itself: the gateway is full, gone, or too late."""
    if status == 429:
        return ApiError(429, _AT_CAPACITY, code="at_capacity", retry_after=float(retry_after or 1))
    if status == 408:
        return ApiError(504, "The request was not done in time.", code="deadline_exceeded")
    # It knows no address either while the gateway is taken away or not there yet.
    if status >= 500 or status == 404:
        return ApiError(503, _REPLACING, code="unavailable", retry_after=1)
    return ApiError(status, "The request was refused.")


_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "union_tag_invalid": "unsupported_value",
    "unsupported_value": "unsupported_value",
}


def from_validation(error: RequestValidationError | ValidationError, within: str = "") -> ApiError:
    """The first thing wrong with a request, its parameter named as a path (`messages.0.content`). within: of what the
    validated is a part (`session`)."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx", {})
    code = context.get("code") or _CODES.get(kind, "invalid_value")
    if kind == "json_invalid":
        return ApiError(400, "The request's body is not valid JSON.", code=code)
    param = _path((*([within] if within else []), *first["loc"], *([context["param"]] if "param" in context else [])))
    message = first["msg"]
    if kind == "missing":
        message = "is required"
    elif kind == "extra_forbidden":
        message = "is not a parameter of this API"
    elif kind == "union_tag_invalid":
        param = f"{param}.{context['discriminator'].strip(chr(39))}"
        message = f"{context['tag']!r} is not supported; {context['expected_tags']} are"
    return ApiError(400, f"{param}: {message}" if param else message, code=code, param=param)


def _path(location: tuple[int | str, ...]) -> str | None:
    """pydantic's location without where FastAPI looked, and without the variant it chose for a list's item."""
    steps = [step for step in location if step not in ("body", "query", "path")]
    kept = [
        str(step)
        for place, step in enumerate(steps)
        if isinstance(step, int) or not (place and isinstance(steps[place - 1], int))
    ]
    return ".".join(kept) or None


def from_http(error: HTTPException) -> ApiError:
    """Routing errors of the framework (404, 405) and form parsing (400)."""
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    return ApiError(error.status_code, str(error.detail), code=codes.get(error.status_code))
