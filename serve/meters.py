"""What is counted of requests, sessions and sound, as Prometheus sees it beside Ray's own metrics (Ray puts `ray_`
before the names). Outside a Ray worker it counts for nobody."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 120]
_FACTORS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 5]
_REFUSALS = (401, 403, 413, 429, 503)
"""Statuses by which whoever asks is turned away, whatever it is that they ask."""
_LATE = 504

GATEWAY_METRICS = (
    "speechgpt_requests_total",
    "speechgpt_request_seconds",
    "speechgpt_stage_seconds",
    "speechgpt_time_to_first_audio_seconds",
    "speechgpt_rejected_total",
    "speechgpt_cancelled_total",
    "speechgpt_active_sessions",
    "speechgpt_responses_total",
)
VOCODER_METRICS = (
    "speechgpt_audio_seconds_generated_total",
    "speechgpt_realtime_factor",
    "speechgpt_stream_underruns_total",
)


def _rejections() -> Counter:
    return Counter("speechgpt_rejected_total", "Requests and sessions turned away.", ("reason",))


def _reason(status: int) -> str:
    return HTTPStatus(status).name.lower()


class DoorMeters:
    """Of one of Ray's HTTP proxies: what comes to no gateway, most of all when there is too much of it."""

    def __init__(self) -> None:
        self._rejected = _rejections()

    def rejected(self, status: int) -> None:
        if status in _REFUSALS:
            self._rejected.inc(1, {"reason": _reason(status)})


class Meters:
    """Of a gateway replica."""

    def __init__(self) -> None:
        self._requests = Counter("speechgpt_requests_total", "Requests that are over.", ("route", "status"))
        self._seconds = Histogram("speechgpt_request_seconds", "From a request to its end.", _SECONDS, ("route",))
        self._stages = Histogram(
            "speechgpt_stage_seconds",
            "What a request waits for: hear (encoder), answer (language model), speak (vocoder), answer aloud (both).",
            _SECONDS,
            ("stage",),
        )
        self._first_audio = Histogram(
            "speechgpt_time_to_first_audio_seconds",
            "Of work until an answer's first sound, in requests and sessions, streamed and whole.",
            _SECONDS,
            ("visit", "kind"),
        )
        self._rejected = _rejections()
        self._cancelled = Counter("speechgpt_cancelled_total", "Answers that were broken off.", ("reason",))
        self._active = Gauge("speechgpt_active_sessions", "Realtime sessions that are open.")
        self._responses = Counter("speechgpt_responses_total", "Responses in realtime sessions.", ("status",))

    def request(self, route: str, status: int, seconds: float, *, gone: bool) -> None:
        """One that is over. status: 0 without an answer. gone: its client left before the end."""
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})
        if status in _REFUSALS:
            self.rejected(_reason(status))
        if gone or status == _LATE:
            self.cancelled("client_gone" if gone else "deadline")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stages.observe(time.monotonic() - began, {"stage": name})

    def first_audio(self, visit: str, kind: str, seconds: float) -> None:
        self._first_audio.observe(seconds, {"visit": visit, "kind": kind})

    def rejected(self, reason: str) -> None:
        self._rejected.inc(1, {"reason": reason})

    def cancelled(self, reason: str) -> None:
        self._cancelled.inc(1, {"reason": reason})

    def active(self, sessions: int) -> None:
        self._active.set(sessions)

    def response(self, status: str, reason: str | None) -> None:
        """One of a session that is over. reason: of one that was cancelled."""
        self._responses.inc(1, {"status": status})
        if reason:
            self.cancelled(reason)


class VoiceMeters:
    """Of a vocoder replica."""

    def __init__(self) -> None:
        self._seconds = Counter("speechgpt_audio_seconds_generated_total", "Sound that was made.")
        self._factor = Histogram(
            "speechgpt_realtime_factor", "Seconds that a streamed answer took for each of its sound.", _FACTORS
        )
        self._underruns = Counter(
            "speechgpt_stream_underruns_total", "Pieces made later than a listener who plays at once needs them."
        )

    def made(self, seconds: float) -> None:
        self._seconds.inc(seconds)

    @contextmanager
    def streamed(self, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[float], None]]:
        """While an answer is made. Gives what is to be told of each piece its seconds of sound."""
        began, total, played_until = clock(), 0.0, None

        def piece(seconds: float) -> None:
            nonlocal total, played_until
            now, total = clock(), total + seconds
            if played_until is not None and now > played_until:
                self._underruns.inc(1)
            played_until = max(now, played_until or now) + seconds

        try:
            yield piece
        finally:
            if total:
                self._seconds.inc(total)
                self._factor.observe((clock() - began) / total)
