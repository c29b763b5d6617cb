"""Tables that hold sounds: Parquet, and a Hugging Face dataset as `save_to_disk` leaves it."""

import json
import posixpath
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechgpt.runtime.corpora.names import below, fields, split_of
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem
from speechgpt.runtime.files import FileFact, StoreError, joined, open_binary, read_bytes
from speechgpt.runtime.inside_files import ByteRange, Cell
from speechgpt.runtime.patience import patiently

_COLUMNS = ("audio", "sound", "speech", "wav", "flac", "mp3", "bytes")
"""Names of the column with the sound, the likeliest first."""
_BATCH = 1000


def parquet(top: str, files: list[FileFact]) -> Iterator[Found]:
    """Rows of `.parquet` files with a column of sound files' bytes, or of {bytes, path}.

    The sounds stay in the files. A name such as `train-00000-of-00004.parquet` says the split.
    """
    names = [file.uri for file in files if file.uri.endswith(".parquet")]
    if not names:
        raise ManifestError(f"{top}: no .parquet there")
    for name in names:
        split = split_of(posixpath.basename(name)) or split_of(posixpath.basename(posixpath.dirname(name)))
        column, others = patiently(partial(_beside_the_sounds, name), StoreError)
        number = 0
        for batch in others.to_batches(_BATCH):
            for given in batch.to_pylist():
                number += 1
                row = _row(below(top, name), number, given, split)
                yield f"{name}:{number}", row | {"path": f"{name}{Cell(number - 1, column)}"}


def _beside_the_sounds(name: str) -> tuple[str, pa.Table]:
    """The name of a Parquet file's column of sounds, and its other columns."""
    try:
        with open_binary(name) as file:
            table = pq.ParquetFile(file, pre_buffer=True)
            column = _sound_column(name, table.schema_arrow)
            return column, table.read([field.name for field in table.schema_arrow if field.name != column])
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{name}: not a Parquet file: {error}") from None


def huggingface(top: str, files: list[FileFact]) -> Iterator[Found]:
    """A `Dataset` or `DatasetDict` on disk; the sounds stay in its Arrow files.

    Over S3 each Arrow file (500 MB, as it is saved) is fetched once for its other columns. Raises ManifestError for a
    directory that is none, and for compressed Arrow files.
    """
    names = {file.uri for file in files}
    states = sorted(name for name in names if posixpath.basename(name) == "state.json")
    if not states:
        raise ManifestError(f"{top}: no state.json below it, so save_to_disk made no dataset there (layout: parquet?)")
    for state in states:
        place = posixpath.dirname(state)
        try:
            shards = [shard["filename"] for shard in json.loads(read_bytes(state))["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{state}: not the state of a dataset: {error}") from None
        for shard in shards:
            if f"{place}/{shard}" not in names:
                raise ManifestError(f"{place}/{shard}: {state} names it, and there is no such file")
            yield from _arrow(top, f"{place}/{shard}", split_of(posixpath.basename(place)))


def _arrow(top: str, name: str, split: str | None) -> Iterator[Found]:
    whole = _buffer(name)
    number = 0
    try:
        with pa.ipc.open_stream(pa.BufferReader(whole)) as stream:
            column = _sound_column(name, stream.schema)
            for batch in stream:
                sounds = batch.column(column)
                ranges = _ranges(name, whole, sounds.field("bytes") if pa.types.is_struct(sounds.type) else sounds)
                paths = sounds.field("path").to_pylist() if _has_path(sounds.type) else [None] * len(batch)
                others = batch.drop_columns([column])
                rows = others.to_pylist() if others.num_columns else [{} for _ in range(len(batch))]
                for given, place, path in zip(rows, ranges, paths, strict=True):
                    number += 1
                    row, where = _row(below(top, name), number, given, split), f"{name}:{number}"
                    if place:
                        yield where, row | {"path": f"{name}{place}"}
                    elif path:
                        yield where, row | {"path": joined(posixpath.dirname(name), path)}
                    else:
                        yield where, Problem(where, "missing_key", f"{column}: neither bytes nor a path")
    except (pa.ArrowInvalid, OSError) as error:
        where = f"{name}:{number + 1}"
        yield where, Problem(where, "unreadable_row", f"the Arrow file cannot be read from here on: {error}")


def _buffer(name: str) -> pa.Buffer:
    """A local file without reading it; a remote one in memory."""
    if "://" not in name:
        with pa.memory_map(name) as file:
            return file.read_buffer()
    return pa.py_buffer(read_bytes(name))


def _ranges(name: str, whole: pa.Buffer, cells: pa.Array) -> list[ByteRange | None]:
    """Where in the file each cell's bytes are; None for an empty cell."""
    if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)):
        raise ManifestError(f"{name}: the sounds are {cells.type}, and bytes of sound files are expected")
    if cells.null_count == len(cells):
        return [None] * len(cells)
    wide = pa.int64() if pa.types.is_large_binary(cells.type) else pa.int32()
    _, offsets, data = cells.buffers()
    bounds = pa.Array.from_buffers(wide, cells.offset + len(cells) + 1, [None, offsets])[cells.offset :].to_pylist()
    start = data.address - whole.address
    if not 0 <= start <= whole.size:
        raise ManifestError(f"{name}: a compressed Arrow file; save the dataset with save_to_disk, or as Parquet")
    filled = cells.is_valid().to_pylist()
    return [
        ByteRange(start + first, stop - first) if there and stop > first else None
        for there, first, stop in zip(filled, bounds, bounds[1:], strict=False)
    ]


def _sound_column(name: str, schema: pa.Schema) -> str:
    def holds_sound(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return "bytes" in {kind.field(index).name for index in range(kind.num_fields)}
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_sound(field.type)]
    likely = [column for column in _COLUMNS if column in found] or (found if len(found) == 1 else [])
    if not likely:
        raise ManifestError(f"{name}: no column of sounds (bytes, or bytes and path) among {schema.names}")
    return likely[0]


def _has_path(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _row(file: str, number: int, given: dict[str, Any], split: str | None) -> dict[str, Any]:
    """file: its place in the corpus, which is in the id, since shards of other splits or languages have its name."""
    row = fields({key: value for key, value in given.items() if value is not None})
    row.setdefault("id", f"{posixpath.splitext(file)[0]}-{number:08d}")
    return row | ({"split": split} if split and not row.get("split") else {})
