"""What sessions count, as Prometheus sees it beside Ray's own metrics (which put `ray_` before the names)."""

from ray.util.metrics import Counter, Gauge, Histogram


class Meters:
    """Of one process. Outside a Ray worker they count for nobody."""

    def __init__(self) -> None:
        self._active = Gauge("speechgpt_active_sessions", "Realtime sessions that are open.")
        self._rejected = Counter("speechgpt_rejected_total", "Realtime sessions that were refused.", ("reason",))
        self._responses = Counter("speechgpt_responses_total", "Responses in realtime sessions.", ("status",))
        self._cancelled = Counter("speechgpt_cancelled_total", "Responses that were broken off.", ("reason",))
        self._first_audio = Histogram(
            "speechgpt_time_to_first_audio_seconds",
            "From the request for a realtime response to its first sound.",
            [0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30],
        )
        self._spoken = Counter("speechgpt_audio_seconds_generated_total", "Sound of realtime responses.")

    def active(self, sessions: int) -> None:
        self._active.set(sessions)

    def rejected(self, reason: str) -> None:
        self._rejected.inc(1, {"reason": reason})

    def ended(self, status: str, reason: str | None, spoken_seconds: float) -> None:
        """A response. reason: of one that was cancelled."""
        self._responses.inc(1, {"status": status})
        if reason:
            self._cancelled.inc(1, {"reason": reason})
        if spoken_seconds:
            self._spoken.inc(spoken_seconds)

    def first_audio(self, seconds: float) -> None:
        self._first_audio.observe(seconds)
