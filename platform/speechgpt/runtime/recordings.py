"""Recordings: the rows of manifests and corpora, checked, with what their sound files say.

A manifest is a list of recordings, one utterance a row, as JSON Lines or Parquet, local or on S3.

Columns: `id, path` (relative to the manifest, absolute, or `s3://`), and if known `text, speaker, language, seconds,
split, answer`. Columns of other names are kept as they are. A `split` whose name begins with `train` or `training` is
learnt from, and every other is held out.
"""

import hashlib
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechgpt.runtime import row_tables, sound_header
from speechgpt.runtime.config import CorpusSection
from speechgpt.runtime.corpora import reading
from speechgpt.runtime.corpora.names import split_of
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem, Row
from speechgpt.runtime.files import StoreError, absolute, joined, open_binary, open_local, read_bytes
from speechgpt.runtime.patience import patiently

UTTERANCE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "seconds": pa.float64(),
        "rate": pa.int32(),
        "split": pa.string(),
        "answer": pa.string(),
        "sha256": pa.string(),
    }
)
"""seconds: as the manifest says, or else the sound file's header; rate (Hz): as the header says. split: `train` or
`heldout`."""
SAME_SOUND_SCHEMA = pa.schema({"id": pa.string(), "same_as": pa.string(), "sha256": pa.string()})
QUARANTINE_SCHEMA = pa.schema({"source": pa.string(), "reason": pa.string(), "detail": pa.string()})

_TEXT_KEYS = ("text", "speaker", "language", "split", "answer")
_NAME_KEYS = ("role", "category", "question_id", "voice")
"""Not in UTTERANCE_SCHEMA, but columns of the units table where a manifest has them; numbers (a ClassLabel's) become
text."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: JSON can spell it, and Python has it for the bytes of a file's name that are no UTF-8."""
_HELD_OUT_SHARE = 0.1
"""Of the recordings whose manifest names no split, drawn by id: so that real speech is measured unheard."""
_FOREVER = 1e9
"""Seconds: thirty years."""
_READERS = 16
_ROWS_AT_ONCE = 100_000
"""Of manifests: held as Python objects, and looked at together."""
_WHERE, _SPLIT = ":where", ":split"
"""Columns for where a row was found, and for the name of its split if nothing is known of that."""
_FOUND_SCHEMA = pa.schema([*UTTERANCE_SCHEMA, (_WHERE, pa.string()), (_SPLIT, pa.string())])
_LARGEST_HELD = 64 << 20
"""Bytes of a sound file that is read at once; a larger one is read in pieces, and its header a second time."""

Outcome = Row | Problem


class SoundFacts(NamedTuple):
    """What a sound file says; seconds and rate (Hz) are None without a header, `error` says why it cannot be read."""

    sha256: str | None = None
    seconds: float | None = None
    rate: int | None = None
    error: str | None = None


Inspect = Callable[[list[str]], Iterable[SoundFacts]]
"""The facts of each path, in the same order."""


@dataclass
class Recordings:
    """Checked rows (every column of UTTERANCE_SCHEMA, paths absolute or `s3://`) and the rows that were set aside.

    table: in the order of their ids; a column of unknown name is JSON text where Parquet has no type for its values.
    unknown_splits: {name: how many rows} of splits that nothing is known of; their rows are held out.
    """

    table: pa.Table
    problems: list[Problem] = field(default_factory=list)
    unknown_splits: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> list[Row]:
        """The table as Python objects, for few rows."""
        return self.table.to_pylist()

    def quarantine(self) -> pa.Table:
        # A source may be a file whose name is no Unicode.
        rows = [[part.encode(errors="backslashreplace").decode() for part in problem] for problem in self.problems]
        return pa.Table.from_pylist([Problem(*row)._asdict() for row in rows], QUARANTINE_SCHEMA)


def inspect(paths: list[str]) -> list[SoundFacts]:
    """`Inspect` by threads of this process. Raises StoreError if the store, not a file, is at fault."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_facts, paths))


def read_manifests(
    uris: Sequence[str], corpora: Sequence[CorpusSection] = (), inspect: Inspect = inspect
) -> Recordings:
    """Read and check manifests, then corpora, in the order given; ids must be unique over all of them.

    A row that cannot be used becomes a Problem and the others go on. Raises ManifestError for a file that is missing,
    of another format, or without the columns `id` and `path`.
    """
    problems: list[Problem] = []
    tables: list[pa.Table] = []
    rows = _all(uris, corpora)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        usable: list[tuple[str, Row]] = []
        for where, row in batch:
            problem = row if isinstance(row, Problem) else _problem(where, row)
            if problem:
                problems.append(problem)
            else:
                usable.append((where, cast("Row", row)))
        complete = []
        for (where, row), facts in zip(usable, inspect([row["path"] for _, row in usable]), strict=True):
            if facts.error is not None:
                problems.append(Problem(where, "missing_file", f"path: {row['path']}: {facts.error}"))
                continue
            # A source may be a file whose name is no Unicode.
            found = {_WHERE: where.encode(errors="backslashreplace").decode(), _SPLIT: _unknown_split(row)}
            complete.append(_complete(row, facts) | found)
        tables.append(row_tables.table_of(complete, _FOUND_SCHEMA))
    table, taken = _unique(row_tables.joined(tables, _FOUND_SCHEMA))
    unknown_splits = Counter(name for name in table[_SPLIT].to_pylist() if name)
    table = row_tables.sort_by(table.drop_columns([_WHERE, _SPLIT]), "id")
    return Recordings(table, problems + taken, unknown_splits)


def _unique(table: pa.Table) -> tuple[pa.Table, list[Problem]]:
    """The rows whose id no earlier one has, and the others."""
    again, first = row_tables.repeats(table["id"])
    if not len(again):
        return table, []
    found = table.select(["id", _WHERE])
    problems = [
        Problem(row[_WHERE], "duplicate_id", f"id {row['id']!r} is already taken by {taken[_WHERE]}")
        for row, taken in zip(found.take(again).to_pylist(), found.take(first).to_pylist(), strict=True)
    ]
    return table.filter(pa.array(np.isin(np.arange(len(table)), again, invert=True))), problems


def _all(uris: Sequence[str], corpora: Sequence[CorpusSection]) -> Iterator[Found]:
    for uri in uris:
        for where, row in _rows(uri):
            yield where, _located(uri, row)
    for corpus in corpora:
        yield from reading.read(corpus)


def _located(manifest: str, row: Outcome) -> Outcome:
    if isinstance(row, Problem) or not isinstance(row.get("path"), str) or not row["path"]:
        return row
    return {**row, "path": joined(posixpath.dirname(absolute(manifest)), row["path"])}


def same_sound(table: pa.Table) -> pa.Table:
    """(id, same_as, sha256) of every row that is not the first with the bytes of its file."""
    again, first = row_tables.repeats(table["sha256"])
    alike = table.select(["id", "sha256"]).take(again)
    return pa.table([alike["id"], table["id"].take(first), alike["sha256"]], SAME_SOUND_SCHEMA)


def sound_of(row: Mapping[str, Any]) -> bytes:
    """The sound file of a table's row: what its `path` names, or in `speech/`, where there is none, the bytes in its
    column `audio`. Raises OSError."""
    # The path first: a manifest may have a column `audio` that holds anything.
    return read_bytes(row["path"]) if "path" in row else row["audio"]


def _rows(uri: str) -> Iterator[Found]:
    """(`uri:number`, row or what is wrong with it); JSON Lines count lines from 1, Parquet counts rows from 1."""
    if not uri.endswith((".parquet", ".jsonl", ".ndjson", ".json")):
        raise ManifestError(f"manifest {uri}: expected a name ending in .jsonl or .parquet")
    try:
        with open_local(uri) as file:
            yield from (_of_parquet if uri.endswith(".parquet") else _of_lines)(uri, file)
    except (FileNotFoundError, IsADirectoryError):
        raise ManifestError(f"manifest {uri}: no such file (data.extra_manifests, or --manifest)") from None


def _of_parquet(uri: str, file: IO[bytes]) -> Iterator[Found]:
    try:
        table = pq.ParquetFile(file)
        if missing := {"id", "path"} - set(table.schema_arrow.names):
            raise ManifestError(f"manifest {uri}: no column {sorted(missing)}; it has {table.schema_arrow.names}")
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{uri}:{number}", row
    except pa.ArrowInvalid as error:
        raise ManifestError(f"manifest {uri}: not a Parquet file: {error}") from None


def _of_lines(uri: str, file: IO[bytes]) -> Iterator[Found]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{uri}:{number}", _parse(f"{uri}:{number}", line)


def _parse(where: str, line: bytes) -> dict[str, Any] | Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Problem(where, "unreadable_row", f"not JSON: {error}")
    if not isinstance(row, dict):
        return Problem(where, "unreadable_row", f"a JSON object is expected, not {type(row).__name__}")
    return row


def _problem(where: str, row: Row) -> Problem | None:
    for key in ("id", "path"):
        if row.get(key) in (None, ""):
            return Problem(where, "missing_key", f"{key}: every row needs one")
    for key in ("id", "path", *_TEXT_KEYS, *_NAME_KEYS):
        value = row.get(key)
        if not isinstance(value, str | int | float | None if key in _NAME_KEYS else str | None):
            return Problem(where, "wrong_type", f"{key}: text is expected, not {value!r}")
        if isinstance(value, str) and _SURROGATE.search(value):
            return Problem(where, "wrong_type", f"{key}: {value!r} is not all Unicode, and no table can hold it")
    if not isinstance(row.get("stranger"), bool | None):
        return Problem(where, "wrong_type", f"stranger: true or false is expected, not {row['stranger']!r}")
    seconds = row.get("seconds")
    if seconds is not None and not _is_length(seconds):
        return Problem(where, "wrong_type", f"seconds: a length in seconds is expected, not {seconds!r}")
    return None


def _is_length(seconds: Any) -> bool:
    """Whether shards can be planned by it: with NaN among them every sum is NaN, and no budget is ever spent."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < _FOREVER


def _complete(row: Row, facts: SoundFacts) -> Row:
    """A row with every column of UTTERANCE_SCHEMA, and a `split` if its manifest gives none."""
    split = (row.get("split") or "").strip() or ("heldout" if drawn(row["id"]) < _HELD_OUT_SHARE else "train")
    return {
        **dict.fromkeys(UTTERANCE_SCHEMA.names),
        **row,
        **{key: str(row[key]) for key in _NAME_KEYS if row.get(key) is not None},
        "text": (row.get("text") or "").strip() or None,
        "seconds": row.get("seconds") or facts.seconds,
        "rate": facts.rate,
        "split": "train" if split_of(split) == "train" else "heldout",
        "sha256": facts.sha256,
    }


def _unknown_split(row: Row) -> str | None:
    split = (row.get("split") or "").strip()
    return split if split and not split_of(split) else None


def _facts(path: str) -> SoundFacts:
    return patiently(lambda: _facts_at_once(path), StoreError) if path.startswith("s3://") else _facts_at_once(path)


def _facts_at_once(path: str) -> SoundFacts:
    try:
        with open_binary(path) as file:
            data = file.read(_LARGEST_HELD)
            digest = hashlib.sha256(data)
            header: sound_header.Header | None
            if len(data) < _LARGEST_HELD:
                header = sound_header.read(io.BytesIO(data))
            else:
                while data := file.read(_LARGEST_HELD):
                    digest.update(data)
                file.seek(0)
                header = sound_header.read(file)
    except StoreError:
        raise
    except OSError as error:
        return SoundFacts(error=str(error))
    return SoundFacts(digest.hexdigest(), *(header or (None, None)))


def drawn(name: str) -> float:
    """In [0, 1), by the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
