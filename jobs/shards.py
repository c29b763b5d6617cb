"""How the corpus is cut into shards, each of which becomes one file of units, of targets or of features; its sounds."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

RECORDINGS = "manifest/utterances.parquet"
GROUP_ROWS = 4096
"""Rows in a row group of RECORDINGS."""
_ROWS_AT_ONCE = 64 * GROUP_ROWS
_LENGTHS = ("seconds", "rate")
_DIGITS = 16
"""Of a hash in a name."""


@dataclass(frozen=True)
class Shard:
    """Part of the input: a file of `speech/`, or a run of recordings."""

    name: str
    """Says what it holds, so that a file of units is never taken for that of other clips: of a file of `speech/`, whose
    own name does; of recordings, a hash of all that the manifest says of them but their lengths."""
    file: str
    first: int
    count: int

    @property
    def units(self) -> str:
        return f"units/part-{self.name}.parquet"

    @property
    def quarantine(self) -> str:
        return f"quarantine/tokenize-{self.name}.parquet"


def plan(workspace: "Workspace", recipe: "Recipe") -> list[Shard]:
    """The shards of what is there, in order of name. Of a corpus that has grown most are as they were."""
    shards = []
    for file in workspace.list("speech"):
        name = file.removeprefix("speech/part-")
        if name != file and name.endswith(".parquet"):
            shards.append(Shard(name.removesuffix(".parquet"), file, 0, workspace.count_rows(file)))
    if workspace.exists(RECORDINGS):
        found = list(of_recordings(workspace.read_rows(RECORDINGS, columns=["id", "seconds"]), recipe))
        for (first, count), digest in zip(found, _digests(workspace, found), strict=True):
            shards.append(Shard(f"recordings-{digest}", RECORDINGS, first, count))
    return sorted(shards, key=lambda shard: shard.name)


def of_recordings(table: "pa.Table", recipe: "Recipe") -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of recordings that become one shard each.

    table: `id` and `seconds` in the manifest's order; a recording of unknown length counts as the longest that is
    taken. Where recordings are added or left out, the runs around them change and no others: an id itself says whether
    a run may begin with it (content-defined chunking).
    """
    from speechgpt.runtime.recordings import drawn

    budget = recipe.corpora.shard_seconds
    ids = (name for part in table["id"].chunks for name in part.to_pylist())
    seconds = (length for part in table["seconds"].chunks for length in part.to_pylist())
    lengths = [recipe.data.max_seconds if length is None else length for length in seconds]
    # One for each half budget, as it happens, and not those that are drawn to be held out.
    begins = (drawn(f"shard:{name}") < 2 * length / budget for name, length in zip(ids, lengths, strict=True))
    return runs(lengths, budget, begins)


def _digests(workspace: "Workspace", found: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Of the recordings of each run; the manifest is read once, some row groups at a time."""
    rows = _told(workspace)
    for _, count in found:
        digest = hashlib.sha256()
        for _, row in zip(range(count), rows, strict=False):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        yield digest.hexdigest()[:_DIGITS]


def _told(workspace: "Workspace") -> Iterator[dict[str, Any]]:
    """What the manifest says of each recording, in its order; a column that others alone have says nothing of it."""
    total = workspace.count_rows(RECORDINGS)
    for first in range(0, total, _ROWS_AT_ONCE):
        for row in workspace.read_rows(RECORDINGS, first, _ROWS_AT_ONCE).to_pylist():
            yield {name: value for name, value in row.items() if value is not None and name not in _LENGTHS}


def runs(lengths: Iterable[float], budget: float, begins: Iterable[bool] = repeat(False)) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive items whose lengths sum to at most `budget`; a longer item stands alone.

    begins: whether a run begins with an item if that before it is half full.
    """
    first, total, index = 0, 0.0, -1
    for index, (length, begin) in enumerate(zip(lengths, begins, strict=False)):
        if index > first and (total + length > budget or (begin and total >= budget / 2)):
            yield first, index - first
            first, total = index, 0.0
        total += length
    if index >= first:
        yield first, index - first + 1


def decoded(rows: Iterable[dict[str, Any]], longest: float) -> "Iterator[tuple[dict[str, Any], np.ndarray]]":
    """Rows of a file of `speech/` or of RECORDINGS, each with its sound, float32 [samples].

    longest: seconds of a clip that is taken. What cannot be read or decoded is left out: `tokenize` reports it.
    """
    from speechgpt.runtime.recordings import sound_of
    from speechgpt.speech import audio

    for row in rows:
        try:
            wave = audio.decode(sound_of(row), max_seconds=longest)
        except (audio.AudioError, OSError):
            continue
        yield row, wave
