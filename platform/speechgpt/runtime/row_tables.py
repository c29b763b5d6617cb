"""Rows with columns of any name as Arrow tables, so that millions of them take a fraction of what Python objects do."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_AS_JSON = {b"speechgpt": b"json"}
"""Marks a column whose values were written as JSON, because Arrow has no type for them."""
_LONGEST_TEXT = 1 << 31
"""Bytes of a `string` array."""


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The schema's columns, then all others that a row has, by name."""
    others = sorted({key for row in rows for key in row} - set(schema.names))
    known = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    columns, fields = [*known], [*schema]
    for name in others:
        values = [row.get(name) for row in rows]
        column = _typed(values)
        as_json = column is None
        columns.append(pa.array([_json(value) for value in values], pa.string()) if column is None else column)
        fields.append(pa.field(name, columns[-1].type, metadata=_AS_JSON if as_json else None))
    return pa.table(columns, pa.schema(fields))


def joined(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """What `table_of` gave of parts of the rows as one table. A column becomes JSON where its parts have no common
    type, or one that Parquet has not; numbers and keys that a part has widened stay so."""
    others = sorted({name for table in tables for name in table.column_names} - set(schema.names))
    whole = pa.concat_tables([table.select(schema.names) for table in tables]) if tables else schema.empty_table()
    for name in others:
        parts = [table.select([name]) if name in table.column_names else _nothing(name, len(table)) for table in tables]
        whole = whole.append_column(name, _one_column(parts))
    return whole


def sort_by(table: pa.Table, name: str) -> pa.Table:
    """The rows in the order of a text column. Columns of more text than Arrow's `string` can hold become
    `large_string`."""
    order = pc.sort_indices(table[name])
    if np.array_equal(order, np.arange(len(table))):
        return table
    # Taking rows joins the parts of a column into one.
    sorted_ = _cast(table, pa.string(), pa.large_string(), lambda column: True).take(order)
    return _cast(sorted_, pa.large_string(), pa.string(), lambda column: column.nbytes < _LONGEST_TEXT)


def _cast(table: pa.Table, of: pa.DataType, to: pa.DataType, chosen: Callable[[pa.ChunkedArray], bool]) -> pa.Table:
    """The chosen ones of the columns of one type as another."""
    changed = [field.type == of and chosen(column) for field, column in zip(table.schema, table.columns, strict=True)]
    fields = [field.with_type(to) if change else field for field, change in zip(table.schema, changed, strict=True)]
    return table.cast(pa.schema(fields))


def repeats(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose text an earlier row has, and of each the first that has it: int64 [repeats]."""
    codes = column.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, firsts, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = firsts[inverse]
    again = np.flatnonzero(first != np.arange(len(first)))
    return again, first[again]


def _one_column(parts: Sequence[pa.Table]) -> pa.ChunkedArray:
    if not any(_is_json(part) for part in parts):
        try:
            whole = pa.concat_tables([part.replace_schema_metadata() for part in parts], promote_options="permissive")
            if _is_writable(whole.schema.field(0).type):
                return whole.column(0)
        except pa.ArrowException:
            pass
    return pa.chunked_array(
        [chunk for part in parts for chunk in (part if _is_json(part) else _rewritten(part)).column(0).chunks],
        pa.string(),
    )


def _is_json(part: pa.Table) -> bool:
    return part.schema.field(0).metadata == _AS_JSON


def _rewritten(part: pa.Table) -> pa.Table:
    return pa.table({"": pa.array([_json(value) for value in part.column(0).to_pylist()], pa.string())})


def _nothing(name: str, rows: int) -> pa.Table:
    return pa.table({name: pa.nulls(rows)})


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, default=str)


def _typed(values: list[Any]) -> pa.Array | None:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _is_writable(kind: pa.DataType) -> bool:
    """Parquet has no objects without keys."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return all(map(_is_writable, inner)) and (bool(inner) or not pa.types.is_struct(kind))
