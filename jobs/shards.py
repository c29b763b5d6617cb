"""How the input of `tokenize` is cut into shards, each of which becomes one file of units."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

RECORDINGS = "manifest/utterances.parquet"
GROUP_ROWS = 4096
"""Rows in a row group of RECORDINGS."""


@dataclass(frozen=True)
class Shard:
    """Part of the input: a file of `speech/`, or a run of recordings."""

    name: str
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
        shards += of_recordings(workspace.read_rows(RECORDINGS, columns=["seconds"])["seconds"].to_pylist(), recipe)
    return sorted(shards, key=lambda shard: shard.name)


def of_recordings(seconds: Iterable[float | None], recipe: "Recipe") -> list[Shard]:
    """seconds: of each recording in the manifest's order; one of unknown length counts as the longest that is taken."""
    lengths = (recipe.data.max_seconds if length is None else length for length in seconds)
    found = runs(lengths, recipe.corpora.shard_seconds)
    return [Shard(f"recordings-{n:05d}", RECORDINGS, first, count) for n, (first, count) in enumerate(found)]


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
