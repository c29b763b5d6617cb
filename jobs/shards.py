"""How the corpus is cut into shards, each of which becomes one file of units, of targets or of features; its sounds."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

RECORDINGS = "manifest/utterances.parquet"
GROUP_ROWS = 4096
"""Rows in a row group of RECORDINGS."""
_ROWS_AT_ONCE = 64 * GROUP_ROWS
_DIGITS = 16
"""Of a hash in a name."""


@dataclass(frozen=True)
class Shard:
    """Part of the input: a file of `speech/`, or a run of recordings."""

    name: str
    """Says what it holds, so that a file of units is never taken for that of other clips: of a file of `speech/`, whose
    own name does; of recordings, their place in the manifest and a hash of their ids, paths and sounds."""
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
    """The shards of what is there, in order of name."""
    shards = []
    for file in workspace.list("speech"):
        name = file.removeprefix("speech/part-")
        if name != file and name.endswith(".parquet"):
            shards.append(Shard(name.removesuffix(".parquet"), file, 0, workspace.count_rows(file)))
    if workspace.exists(RECORDINGS):
        seconds = workspace.read_rows(RECORDINGS, columns=["seconds"])["seconds"].to_pylist()
        found = list(of_recordings(seconds, recipe))
        for number, ((first, count), digest) in enumerate(zip(found, _digests(workspace, found), strict=True)):
            shards.append(Shard(f"recordings-{number:05d}-{digest}", RECORDINGS, first, count))
    return sorted(shards, key=lambda shard: shard.name)


def of_recordings(seconds: Iterable[float | None], recipe: "Recipe") -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of recordings that become one shard each.

    seconds: of each recording in the manifest's order; one of unknown length counts as the longest that is taken.
    """
    lengths = (recipe.data.max_seconds if length is None else length for length in seconds)
    return runs(lengths, recipe.corpora.shard_seconds)


def _digests(workspace: "Workspace", found: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Of the recordings of each run; the manifest is read once, some row groups at a time."""
    rows = _sounds(workspace)
    for _, count in found:
        digest = hashlib.sha256()
        for _, row in zip(range(count), rows, strict=False):
            digest.update(json.dumps(row).encode())
        yield digest.hexdigest()[:_DIGITS]


def _sounds(workspace: "Workspace") -> Iterator[tuple[str | None, ...]]:
    """What each recording is, in the manifest's order."""
    total = workspace.count_rows(RECORDINGS)
    for first in range(0, total, _ROWS_AT_ONCE):
        table = workspace.read_rows(RECORDINGS, first, _ROWS_AT_ONCE, columns=["id", "path", "sha256"])
        yield from zip(*(table[name].to_pylist() for name in ("id", "path", "sha256")), strict=True)


def runs(lengths: Iterable[float], budget: float) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive items whose lengths sum to at most `budget`; a longer item stands alone."""
    first, total, index = 0, 0.0, -1
    for index, length in enumerate(lengths):
        if index > first and total + length > budget:
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
