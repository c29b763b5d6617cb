"""Manifests: lists of recordings, one utterance a row, as JSON Lines or Parquet, local or on S3.

Columns: `id, path` (relative to the manifest, absolute, or `s3://`), and if known `text, speaker, language, seconds,
split, answer`. Columns of other names are kept as they are.
"""

import hashlib
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from speechgpt.runtime import buckets

UTTERANCE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "seconds": pa.float64(),
        "split": pa.string(),
        "answer": pa.string(),
        "sha256": pa.string(),
    }
)
QUARANTINE_SCHEMA = pa.schema({"source": pa.string(), "reason": pa.string(), "detail": pa.string()})

_TEXT_KEYS = ("text", "speaker", "language", "split", "answer")
_HELD_OUT_SHARE = 0.1
"""Of the recordings whose manifest names no split, drawn by id: so that real speech is measured unheard."""
_READERS = 16


class ManifestError(ValueError):
    """A manifest that cannot be used at all; the message names the file and what to do."""


class Problem(NamedTuple):
    """One row that was set aside: `source` is `manifest:row`, `reason` a stable slug, `detail` for people."""

    source: str
    reason: str
    detail: str


@dataclass
class Recordings:
    """Checked rows (every column of UTTERANCE_SCHEMA, paths absolute or `s3://`) and the rows that were set aside."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def table(self) -> pa.Table:
        """The rows in id order; a column of unknown name whose values do not agree in type becomes JSON text."""
        known = set(UTTERANCE_SCHEMA.names)
        extra = sorted({key for row in self.rows for key in row} - known)
        rows = sorted(self.rows, key=lambda row: row["id"])
        columns = {name: pa.array([row.get(name) for row in rows], UTTERANCE_SCHEMA.field(name).type) for name in known}
        table = pa.table({name: columns[name] for name in UTTERANCE_SCHEMA.names})
        for name in extra:
            table = table.append_column(name, _column([row.get(name) for row in rows]))
        return table

    def quarantine(self) -> pa.Table:
        return pa.Table.from_pylist([problem._asdict() for problem in self.problems], QUARANTINE_SCHEMA)


def read_manifests(uris: Sequence[str]) -> Recordings:
    """Read and check manifests in the order given; ids must be unique over all of them.

    A row that cannot be used becomes a Problem and the others go on. Raises ManifestError for a file that is missing,
    of another format, or without the columns `id` and `path`.
    """
    found = Recordings()
    first_seen: dict[str, str] = {}
    for uri in uris:
        for where, row in _rows(uri):
            problem = row if isinstance(row, Problem) else _check(where, row, first_seen)
            if problem:
                found.problems.append(problem)
                continue
            assert isinstance(row, dict)
            first_seen[row["id"]] = where
            found.rows.append({**row, "path": _absolute(uri, row["path"]), "_where": where})
    with ThreadPoolExecutor(_READERS) as pool:
        outcomes = list(pool.map(_inspect, found.rows))
    found.rows = [row for row in outcomes if isinstance(row, dict)]
    found.problems += [problem for problem in outcomes if isinstance(problem, Problem)]
    return found


PACKAGE = "package:"
"""Scheme of files that come with this package: the same name on every machine, wherever it is installed."""


def read_bytes(path: str) -> bytes:
    """The bytes of a local file, an `s3://` object or a `package:` file. Raises FileNotFoundError."""
    with open_binary(path) as file:
        return file.read()


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """The same files open for reading, for those too large to hold; seekable. Raises FileNotFoundError."""
    if path.startswith(PACKAGE):
        with resources.files("speechgpt").joinpath(path.removeprefix(PACKAGE)).open("rb") as packaged:
            yield packaged
    elif path.startswith("s3://"):
        address = path.removeprefix("s3://")
        with buckets.filesystem(f"s3://{address.partition('/')[0]}").open_input_file(address) as remote:
            yield cast("IO[bytes]", remote)
    else:
        with Path(path).open("rb") as local:
            yield local


def sound_of(row: Mapping[str, Any]) -> bytes:
    """The sound file of a table's row: the bytes in its column `audio`, or what its `path` names. Raises OSError."""
    return row["audio"] if "audio" in row else read_bytes(row["path"])


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
    for key in ("id", "path", *_TEXT_KEYS):
        if not isinstance(row.get(key), str | None):
            return Problem(where, "wrong_type", f"{key}: text is expected, not {row[key]!r}")
    seconds = row.get("seconds")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0):
        return Problem(where, "wrong_type", f"seconds: a length in seconds is expected, not {seconds!r}")
    if row["id"] in first_seen:
        return Problem(where, "duplicate_id", f"id {row['id']!r} is already taken by {first_seen[row['id']]}")
    return None


def _absolute(manifest: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return path
    return posixpath.normpath(posixpath.join(posixpath.dirname(manifest), path)).replace("s3:/", "s3://", 1)


def _inspect(row: dict[str, Any]) -> dict[str, Any] | Problem:
    """Complete a row with what its file says: `sha256`, `seconds`, and a `split` if the manifest gives none."""
    where = row.pop("_where")
    try:
        data = read_bytes(row["path"])
    except OSError as error:
        return Problem(where, "missing_file", f"path: {row['path']}: {error}")
    split = row.get("split") or ("heldout" if _drawn(row["id"]) < _HELD_OUT_SHARE else "train")
    return {
        **dict.fromkeys(UTTERANCE_SCHEMA.names),
        **row,
        "text": (row.get("text") or "").strip() or None,
        "seconds": row.get("seconds") or _header_seconds(data),
        "split": "train" if split == "train" else "heldout",
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _header_seconds(data: bytes) -> float | None:
    """Length that the file's header claims; None if libsndfile finds none (`tokenize` decodes and decides)."""
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except soundfile.LibsndfileError:
        return None


def _drawn(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else json.dumps(value) for value in values])
