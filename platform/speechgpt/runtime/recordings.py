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
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from speechgpt.runtime import sound_header
from speechgpt.runtime.config import CorpusSection
from speechgpt.runtime.corpora import reading
from speechgpt.runtime.corpora.names import split_of
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem, Row
from speechgpt.runtime.files import StoreError, absolute, joined, open_binary, read_bytes
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

    unknown_splits: {name: how many rows} of splits that nothing is known of; their rows are held out.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unknown_splits: Counter[str] = field(default_factory=Counter)

    def table(self) -> pa.Table:
        """The rows in id order; a column of unknown name becomes JSON text where Parquet has no type for its values."""
        known = set(UTTERANCE_SCHEMA.names)
        extra = sorted({key for row in self.rows for key in row} - known)
        rows = sorted(self.rows, key=lambda row: row["id"])
        columns = {name: pa.array([row.get(name) for row in rows], UTTERANCE_SCHEMA.field(name).type) for name in known}
        table = pa.table({name: columns[name] for name in UTTERANCE_SCHEMA.names})
        for name in extra:
            table = table.append_column(name, _column([row.get(name) for row in rows]))
        return table

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
    found = Recordings()
    first_seen: dict[str, str] = {}
    usable = []
    for where, row in _all(uris, corpora):
        problem = row if isinstance(row, Problem) else _check(where, row, first_seen)
        if problem:
            found.problems.append(problem)
            continue
        assert isinstance(row, dict)
        first_seen[row["id"]] = where
        usable.append((where, row))
    for (where, row), facts in zip(usable, inspect([row["path"] for _, row in usable]), strict=True):
        if facts.error is not None:
            found.problems.append(Problem(where, "missing_file", f"path: {row['path']}: {facts.error}"))
        else:
            found.rows.append(_complete(row, facts))
            if (split := (row.get("split") or "").strip()) and not split_of(split):
                found.unknown_splits[split] += 1
    return found


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


def same_sound(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(row, the first row in id order whose file has the same bytes), for every row that is not a first one."""
    first: dict[str, Row] = {}
    pairs = []
    for row in sorted(rows, key=lambda row: row["id"]):
        if first.setdefault(row["sha256"], row) is not row:
            pairs.append((row, first[row["sha256"]]))
    return pairs


def sound_of(row: Mapping[str, Any]) -> bytes:
    """The sound file of a table's row: what its `path` names, or in `speech/`, where there is none, the bytes in its
    column `audio`. Raises OSError."""
    # The path first: a manifest may have a column `audio` that holds anything.
    return read_bytes(row["path"]) if "path" in row else row["audio"]


def _rows(uri: str) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """(`uri:number`, row or what is wrong with it); JSON Lines count lines from 1, Parquet counts rows from 1."""
    try:
        data = read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError):
        raise ManifestError(f"manifest {uri}: no such file (data.extra_manifests, or --manifest)") from None
    if uri.endswith(".parquet"):
        try:
            table = pq.read_table(io.BytesIO(data))
        except pa.ArrowInvalid as error:
            raise ManifestError(f"manifest {uri}: not a Parquet file: {error}") from None
        if missing := {"id", "path"} - set(table.column_names):
            raise ManifestError(f"manifest {uri}: no column {sorted(missing)}; it has {table.column_names}")
        for number, row in enumerate(table.to_pylist(), 1):
            yield f"{uri}:{number}", row
        return
    if not uri.endswith((".jsonl", ".ndjson", ".json")):
        raise ManifestError(f"manifest {uri}: expected a name ending in .jsonl or .parquet")
    for number, line in enumerate(data.split(b"\n"), 1):
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


def _check(where: str, row: dict[str, Any], first_seen: dict[str, str]) -> Problem | None:
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
    if row["id"] in first_seen:
        return Problem(where, "duplicate_id", f"id {row['id']!r} is already taken by {first_seen[row['id']]}")
    return None


def _is_length(seconds: Any) -> bool:
    """Whether shards can be planned by it: with NaN among them every sum is NaN, and no budget is ever spent."""
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < _FOREVER


def _complete(row: Row, facts: SoundFacts) -> Row:
    """A row with every column of UTTERANCE_SCHEMA, and a `split` if its manifest gives none."""
    split = (row.get("split") or "").strip() or ("heldout" if _drawn(row["id"]) < _HELD_OUT_SHARE else "train")
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


def _drawn(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        if _is_writable(column.type):
            return column
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values])


def _is_writable(kind: pa.DataType) -> bool:
    """Parquet has no objects without keys."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return all(map(_is_writable, inner)) and (bool(inner) or not pa.types.is_struct(kind))
