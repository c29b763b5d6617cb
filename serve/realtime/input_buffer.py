"""The sound that a client has sent and nobody has committed yet, placed in the whole of its stream."""

from typing import TYPE_CHECKING

from serve.realtime.sound import RATE

if TYPE_CHECKING:
    import numpy as np


class InputBuffer:
    """Samples are counted from the beginning of the session, whatever was taken or cleared since."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self.start = self.end = 0

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / RATE

    def push(self, wave: "np.ndarray") -> None:
        """wave: float32 [samples]."""
        self._pieces.append(wave)
        self.end += len(wave)

    def trim(self, samples: int) -> None:
        """Drop all but the last so many."""
        self._drop(self.end - samples)

    def take(self, start: int, end: int) -> "np.ndarray":
        """float32 [samples] between two places; these and what is before them are gone."""
        import numpy as np

        joined = np.concatenate([*self._pieces, np.zeros(0, np.float32)])
        taken = joined[max(0, start - self.start) : max(0, end - self.start)].copy()
        self._drop(end)
        return taken

    def clear(self) -> None:
        self._drop(self.end)

    def _drop(self, before: int) -> None:
        while self._pieces and self.start + len(self._pieces[0]) <= before:
            self.start += len(self._pieces.pop(0))
        if self._pieces and self.start < before:
            # A copy: a view would keep the whole piece in memory.
            self._pieces[0] = self._pieces[0][before - self.start :].copy()
            self.start = before
