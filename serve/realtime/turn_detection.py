"""When somebody begins and ceases to speak: server voice-activity detection, frame by frame."""

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.realtime.session_config import ServerVad
from serve.realtime.sound import RATE

if TYPE_CHECKING:
    import numpy as np

FRAME = 320
"""Samples (20 ms)."""
_BAND = (250, 3000)
"""Hz: where vowels are, as in `speechgpt.speech.activity`."""
_ONSET_FRAMES = 3
"""Speech must last so long (60 ms) to be no click."""
_FLOOR_FRAMES = 150
"""The quietest frame of so long (3 s) is what the room sounds like: speech pauses between words."""
_FLOOR = (-70.0, -20.0)
"""Decibels below full scale between which a room's level is believed."""
_HALF = 14.0
"""Decibels above the room that a threshold of 0.5 asks for; stationary noise stays within 5 dB of its quietest frame by
itself, and in a band of its own rarely goes beyond 10."""
_SLOPE = 3.0
_HOLD = 0.15
"""Who speaks already goes on speaking down to a threshold lower by so much: words end softer than they begin."""


@dataclass(frozen=True)
class Started:
    """at: sample of the stream from which on the turn is kept, its padding included."""

    at: int


@dataclass(frozen=True)
class Stopped:
    """at: sample of the stream to which the turn is kept, its final silence included."""

    at: int


class VoiceActivity:
    """One stream. What it says depends on the samples alone, however they are cut into pieces.

    longest: samples, after which a turn is ended although somebody speaks on.
    """

    def __init__(self, settings: ServerVad, longest: int, at: int = 0) -> None:
        """at: where in the stream the next sample stands."""
        from scipy import signal

        self._filter = signal.butter(4, _BAND, "bandpass", fs=RATE, output="sos")
        self._state = signal.sosfilt_zi(self._filter) * 0.0
        self._levels: deque[float] = deque(maxlen=_FLOOR_FRAMES)
        self._settings = settings
        self._longest = longest
        self._first = self._at = at
        self._rest: list[np.ndarray] = []
        self._held = 0
        self._onset = self._silence = 0
        self._began: int | None = None

    @property
    def speaking(self) -> bool:
        return self._began is not None

    @property
    def padding(self) -> int:
        """Samples before the next one that may yet belong to a turn."""
        return self._padding + (_ONSET_FRAMES + 1) * FRAME

    def adjust(self, settings: ServerVad) -> None:
        """Other thresholds from now on; what is known of the room stays."""
        self._settings = settings

    def push(self, wave: "np.ndarray") -> list[Started | Stopped]:
        """wave: float32 [samples], what follows in the stream."""
        import numpy as np
        from scipy import signal

        self._rest.append(wave)
        self._held += len(wave)
        if self._held < FRAME:
            return []
        joined = np.concatenate(self._rest)
        whole = len(joined) // FRAME * FRAME
        self._rest, self._held = [joined[whole:]], len(joined) - whole
        band, self._state = signal.sosfilt(self._filter, joined[:whole], zi=self._state)
        energies = np.mean(np.square(band.reshape(-1, FRAME)), axis=1)
        found: list[Started | Stopped] = []
        for energy in energies.tolist():
            self._at += FRAME
            found += self._frame(10 * math.log10(energy + 1e-12))
        return found

    def _frame(self, level: float) -> list[Started | Stopped]:
        self._levels.append(level)
        room = min(max(min(self._levels), _FLOOR[0]), _FLOOR[1])
        likely = 1 / (1 + math.exp(-max(-40.0, min(40.0, (level - room - _HALF) / _SLOPE))))
        if self._began is None:
            self._onset = self._onset + 1 if likely >= self._settings.threshold else 0
            if self._onset < _ONSET_FRAMES:
                return []
            self._began = max(self._first, self._at - _ONSET_FRAMES * FRAME - self._padding)
            self._silence = 0
            return [Started(self._began)]
        self._silence = 0 if likely >= self._settings.threshold - _HOLD else self._silence + 1
        patience = max(1, self._settings.silence_duration_ms // 20)
        if self._silence < patience and self._at - self._began < self._longest - FRAME:
            return []
        # The next turn must not begin in this one.
        self._first, self._began, self._onset = self._at, None, 0
        return [Stopped(self._at)]

    @property
    def _padding(self) -> int:
        return self._settings.prefix_padding_ms * RATE // 1000
