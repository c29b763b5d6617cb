"""Which blocks training has read, as an account that is kept over restarts and any number of workers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed


class Ledger:
    """Counts the blocks that a rank read, and sums a hash of their indices.

    Sums do not care about order or about who read what, so those of all ranks together equal the sums of the blocks
    that should have been read only if none was skipped and none read twice.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._sum = 0

    def add(self, indices: Sequence[int]) -> None:
        self.blocks += len(indices)
        self._sum = (self._sum + _hash_sum(indices)) % 2**64

    def state(self) -> dict[str, Any]:
        """For a checkpoint's JSON."""
        return {"blocks": self.blocks, "sum": f"{self._sum:016x}"}

    def take_over(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of earlier ranks, however many they were; raises KeyError, ValueError for others."""
        self.blocks += sum(int(state["blocks"]) for state in states)
        self._sum = (self._sum + sum(int(state["sum"], 16) for state in states)) % 2**64

    def settle(self, expected: range, device: torch.device) -> int:
        """The number of blocks that all ranks read; every rank calls it.

        Raises RuntimeError unless they are `expected`, each once.
        """
        mine = [self.blocks, self._sum - 2**64 if self._sum >= 2**63 else self._sum]
        total = torch.tensor(mine, dtype=torch.int64, device=device)
        distributed.all_reduce(total)
        blocks, found = total.tolist()
        if (blocks, found % 2**64) != (len(expected), _hash_sum(expected)):
            raise RuntimeError(
                f"{blocks} blocks were read where {len(expected)} should have been, each once: some were skipped or "
                "read twice; the stage's checkpoints are not of one run, remove them to train it again"
            )
        return int(blocks)


def _hash_sum(indices: Sequence[int]) -> int:
    """Sum of splitmix64 of the indices, modulo 2^64 (Steele, Lea and Flood, 2014)."""
    total = 0
    for first in range(0, len(indices), 1 << 20):
        x = np.asarray(indices[first : first + (1 << 20)], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))
    return total % 2**64
