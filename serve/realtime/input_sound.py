"""The sound that a client streams, from its bytes to the turns that are found in it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from serve.errors import ApiError
from serve.realtime.input_buffer import InputBuffer
from serve.realtime.session_config import AudioInput
from serve.realtime.sound import RATE, Incoming, seconds_of
from serve.realtime.turn_detection import Started, Stopped, VoiceActivity

if TYPE_CHECKING:
    import numpy as np

_LEAST_SECONDS = 0.1
"""Less sound than this is no turn."""


class InputSound:
    """settings: of the session. longest: seconds that may wait here, and of a turn that is found."""

    def __init__(self, settings: AudioInput, longest: float) -> None:
        self._settings = settings
        self._longest = longest
        self._incoming = Incoming(settings.format)
        self._buffer = InputBuffer()
        self._activity: VoiceActivity | None = None
        self._adjust_activity()

    @property
    def speaking(self) -> bool:
        """Whether somebody is in the middle of a turn, as far as is listened for turns."""
        return self._activity is not None and self._activity.speaking

    @property
    def bounds(self) -> tuple[int, int]:
        """The samples of the stream that wait here."""
        return self._buffer.start, self._buffer.end

    def adjust(self, settings: AudioInput) -> None:
        """Other settings from now on."""
        before, self._settings = self._settings, settings
        if settings.format != before.format:
            self._end_of_stream()
        self._adjust_activity()

    def check_room(self, size: int) -> None:
        """Raises ApiError where so many bytes more are too many."""
        if self._activity is None and self._buffer.seconds + seconds_of(size, self._settings.format) > self._longest:
            raise ApiError(
                400,
                f"audio: more than {self._longest:g} s in the buffer; commit or clear it",
                code="input_audio_buffer_full",
                param="audio",
            )

    def push(self, data: bytes) -> Iterator[Started | Stopped]:
        """What follows in the stream. What is found is to be taken before the next is asked for."""
        wave = self._incoming.push(data)
        self._buffer.push(wave)
        if self._activity:
            yield from self._activity.push(wave)
            if not self._activity.speaking:
                self._buffer.trim(self._activity.padding)

    def take(self, end: int) -> "np.ndarray":
        """All up to a sample of the stream, float32 [samples]; it is gone from here."""
        return self._buffer.take(self._buffer.start, end)

    def take_turn(self) -> "np.ndarray":
        """All that is here, as a turn that the client ends. Raises ApiError where that is too little."""
        self._end_of_stream()
        if self._buffer.seconds < _LEAST_SECONDS:
            raise ApiError(
                400,
                f"The buffer has {self._buffer.seconds * 1000:.0f} ms of sound; a turn has at least 100.",
                code="input_audio_buffer_commit_empty",
            )
        wave = self.take(self._buffer.end)
        self._adjust_activity(anew=True)
        return wave

    def drop(self) -> None:
        """All that is here was no turn."""
        self._buffer.clear()

    def clear(self) -> None:
        """As `drop`, and whoever was speaking has not."""
        self._buffer.clear()
        self._adjust_activity(anew=True)

    def _adjust_activity(self, *, anew: bool = False) -> None:
        detection = self._settings.turn_detection
        if detection is None:
            self._activity = None
        elif self._activity is None or anew:
            self._activity = VoiceActivity(detection, round(self._longest * RATE), self._buffer.end)
        else:
            self._activity.adjust(detection)

    def _end_of_stream(self) -> None:
        """What the resampler still holds belongs to what came before."""
        self._buffer.push(self._incoming.push(b"", last=True))
        self._incoming = Incoming(self._settings.format)
