"""Asking a service with OpenAI's routes, patiently; what it is for is its caller's business."""

import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from speechgpt.speech.config import HttpServiceSection

_TRY_AGAIN = {408, 409, 425, 429}
_LONGEST_WAIT = 60.0
"""Seconds; a service that asks for more is asked again after these."""


class ServiceError(RuntimeError):
    """A service that gave nothing; the message says what it answered, and never the key."""


@dataclass
class HttpService:
    """One service. Its key is read from the environment when it is first asked, and is written nowhere.

    wanted: what it is to give, for its errors.
    """

    section: HttpServiceSection
    wanted: str
    _client: httpx.Client | None = field(default=None, init=False, repr=False)

    def post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        """The answer to `POST URL/route`. Raises ServiceError."""
        problem = ""
        for attempt in range(self.section.retries + 1):
            try:
                answer = self._connected().post(route, json=body)
            except httpx.HTTPError as error:
                problem, wait = f"{type(error).__name__}: {error}", None
            else:
                if answer.is_success:
                    return answer
                problem = f"{answer.status_code}: {self._without_key(answer.text)[:200]}"
                if answer.status_code not in _TRY_AGAIN and answer.status_code < 500:
                    raise ServiceError(f"{self.section.url}: {problem}{self._about_key(answer.status_code)}")
                wait = _asked_wait(answer)
            if attempt < self.section.retries:
                time.sleep(_wait(attempt, wait))
        raise ServiceError(f"{self.section.url}: no {self.wanted} after {self.section.retries + 1} attempts: {problem}")

    @property
    def _key(self) -> str:
        return os.environ.get(self.section.key_variable, "") if self.section.key_variable else ""

    def _connected(self) -> httpx.Client:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            base = self.section.url.rstrip("/") + "/"
            self._client = httpx.Client(base_url=base, headers=headers, timeout=self.section.timeout_seconds)
        return self._client

    def _without_key(self, text: str) -> str:
        """What a service says about a key it does not know may quote it."""
        return text.replace(self._key, "…") if self._key else text

    def _about_key(self, status: int) -> str:
        if status not in (401, 403) or not self.section.key_variable:
            return ""
        name = self.section.key_variable
        return f" (the key comes from {name}, which is {'set' if os.environ.get(name) else 'not set'})"


def _asked_wait(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _wait(attempt: int, asked: float | None) -> float:
    """Half a second, doubled each time, give or take a quarter, so that many workers do not come back together."""
    wait = asked if asked is not None else 0.5 * 2**attempt * random.uniform(0.75, 1.25)
    return min(wait, _LONGEST_WAIT)
