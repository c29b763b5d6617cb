"""The clips that an encoder learns from, read piece by piece from where `encoder_targets` wrote them.

Not by Ray Data, whose blocks come in another order each time: a training that goes on must read what it would have
read.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jobs.encoder_targets import GROUP_ROWS, Labelling
from jobs.shell import JobError

if TYPE_CHECKING:
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.training.hearing import Clip

_READERS = 16
_VALIDATION = 64
"""Clips kept out of training, at most an eighth, to measure it on."""


def write_index(workspace: "Workspace", labelling: Labelling, workers: int) -> float:
    """List the pieces of what was labelled, so that workers need not open every file of it; gives seconds in all.

    A piece is a run of clips of one file. There are several for each worker, if there are so many clips. Raises
    JobError where there is less than one clip a worker.
    """
    import pyarrow as pa

    files = workspace.list(labelling.targets)
    with ThreadPoolExecutor(_READERS) as readers:
        lengths = list(readers.map(lambda file: workspace.read_rows(file, columns=["seconds"])["seconds"], files))
    count = sum(map(len, lengths))
    if (training := count - _kept_out(count)) < workers:
        raise JobError(f"{training} clips to learn from for {workers} workers (encoder.training.workers)")
    rows = max(1, min(GROUP_ROWS, count // (4 * workers)))
    pieces = [
        {"file": file, "first": first, "seconds": seconds[first : first + rows].to_pylist()}
        for file, seconds in zip(files, lengths, strict=True)
        for first in range(0, len(seconds), rows)
    ]
    schema = pa.schema({"file": pa.string(), "first": pa.int64(), "seconds": pa.list_(pa.float64())})
    workspace.write_table(labelling.index, pa.Table.from_pylist(pieces, schema))
    return float(sum(sum(piece["seconds"]) for piece in pieces))


def _kept_out(count: int) -> int:
    return min(_VALIDATION, count // 8)


class LabelledClips:
    """Clips by number. A worker holds the pieces of one window of `hearing.batch_plan`, as they were stored."""

    def __init__(self, workspace: "Workspace", labelling: Labelling, seed: int) -> None:
        """seed: draws the clips that are kept out of training."""
        import numpy as np

        from speechgpt.training.hearing import WINDOW

        index = workspace.read_table(labelling.index)
        seconds = index["seconds"].combine_chunks()
        self._workspace = workspace
        self._files, self._firsts = index["file"].to_pylist(), index["first"].to_pylist()
        self._bounds = seconds.offsets.to_numpy()
        self.seconds = seconds.flatten().to_numpy()
        count = len(self.seconds)
        drawn = np.random.default_rng(seed).permutation(count)
        self._kept_out = np.sort(drawn[: _kept_out(count)])
        ranges = (np.arange(*bounds) for bounds in zip(self._bounds, self._bounds[1:], strict=False))
        pieces = (numbers[~np.isin(numbers, self._kept_out)] for numbers in ranges)
        self.pieces = [numbers for numbers in pieces if len(numbers)]
        """Numbers of the clips of each piece that are learnt from."""
        self._piece = lru_cache(WINDOW)(self._read)

    def __getitem__(self, number: int) -> "Clip":
        piece = self._piece_of(number)
        return self._clip(self._piece(piece), piece, number)

    @cached_property
    def kept_out(self) -> "list[Clip]":
        """Read past the window, which training needs."""
        pieces = groupby(map(int, self._kept_out), self._piece_of)
        return [self._clip(table, piece, n) for piece, ns in pieces for table in [self._read(piece)] for n in ns]

    def _piece_of(self, number: int) -> int:
        import numpy as np

        return int(np.searchsorted(self._bounds, number, side="right")) - 1

    def _clip(self, table: Any, piece: int, number: int) -> "Clip":
        import numpy as np

        from speechgpt.speech import audio
        from speechgpt.training.hearing import Clip

        row = table.slice(number - self._bounds[piece], 1).to_pylist()[0]
        return Clip(audio.decode(row["audio"]), np.array(row["targets"], np.int16))

    def _read(self, piece: int) -> Any:
        count = int(self._bounds[piece + 1] - self._bounds[piece])
        return self._workspace.read_rows(self._files[piece], self._firsts[piece], count, columns=["audio", "targets"])
