"""When something that takes all ranks is due, if it is to be done every few seconds and not every step."""

import time

import torch
from torch import distributed


class Pace:
    """The steps after which it is due, the same on every rank: by rank 0's clock, told to the others when it is."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds, self._device = seconds, device
        self._next: int | None = None
        self._since, self._last = 0.0, 0

    def due(self, finished: int) -> bool:
        """Whether it is due after `finished` steps; every rank calls it after each step."""
        if self._next is not None and finished < self._next:
            return False
        now = time.monotonic()
        stride = 1
        if self._next is not None:
            taken = (now - self._since) / (finished - self._last)
            stride = max(1, min(int(self._seconds / max(taken, 1e-6)), 2 * (finished - self._last)))
        told = torch.tensor([stride], device=self._device)
        distributed.broadcast(told, src=0)
        self._since, self._last = now, finished
        self._next = finished + int(told.item())
        return True
