"""Rows as tables: what is put together of parts is what one gets of the whole, whatever the columns hold."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.runtime import recordings, row_tables

SCHEMA = pa.schema({"id": pa.string(), "seconds": pa.float64()})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.just(2**70),
    st.text("ab\ud83d", max_size=2),
    st.lists(st.integers(0, 3), max_size=2),
)
OBJECTS = st.none() | st.dictionaries(st.sampled_from("xy"), st.integers(0, 3))
ROWS = st.lists(st.fixed_dictionaries({"id": st.text("ab")}, optional={"take": SCALARS, "more": OBJECTS}), max_size=8)


@given(ROWS, st.integers(1, 4))
def test_parts_put_together_are_the_whole(rows: list[dict], together: int) -> None:
    parts = [rows[first : first + together] for first in range(0, len(rows), together)]
    found = row_tables.joined([row_tables.table_of(part, SCHEMA) for part in parts], SCHEMA)
    whole = row_tables.joined([row_tables.table_of(rows, SCHEMA)], SCHEMA)
    assert found.to_pylist() == whole.to_pylist()
    assert found.column_names == whole.column_names
    pq.write_table(found, io.BytesIO())


@given(st.lists(st.text("ab", max_size=2)), st.integers(1, 3))
def test_repeats_and_the_first_of_each(values: list[str], together: int) -> None:
    chunks = [values[first : first + together] for first in range(0, len(values), together)]
    again, first = row_tables.repeats(pa.chunked_array(chunks, pa.string()))
    pairs = [(row, values.index(value)) for row, value in enumerate(values)]
    assert [*zip(again.tolist(), first.tolist(), strict=True)] == [(row, one) for row, one in pairs if row != one]


@pytest.mark.parametrize("names", [[], ["a", "b", "c"], ["c", "a", "b", "a"]])
def test_rows_are_put_in_order(names: list[str]) -> None:
    table = pa.table({"id": pa.array(names, pa.string()), "at": range(len(names))})
    assert row_tables.sort_by(table, "id").to_pylist() == sorted(table.to_pylist(), key=lambda row: row["id"])


def manifest(file: Path, count: int) -> str:
    rows = ({"id": f"u{n:06d}", "path": f"{n}.wav", "text": "hello " * 5, "take": n} for n in range(count))
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def facts(paths: list[str]) -> list[recordings.SoundFacts]:
    return [recordings.SoundFacts(hashlib.sha256(path.encode()).hexdigest(), 1.0, 16000) for path in paths]


PEAKS = """
import sys, tracemalloc
from speechgpt.runtime import recordings

def facts(paths):
    return [recordings.SoundFacts(f"{number:064x}", 1.0, 16000) for number in range(len(paths))]

recordings._ROWS_AT_ONCE = 500
few, many = sys.argv[1:]
recordings.read_manifests([few], inspect=facts)
for uri in (few, many):
    tracemalloc.start()
    table = recordings.read_manifests([uri], inspect=facts).table
    print(len(table), table.nbytes, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_python_objects_are_those_of_few_rows(tmp_path: Path) -> None:
    """A row more takes an index more of Python's memory, 130 bytes, where its objects would be a kilobyte and more.

    In a process of its own: what other threads hold, and what is imported at the first use, would count.
    """
    counts = (2000, 20_000)
    words = [manifest(tmp_path / f"{count}.jsonl", count) for count in counts]
    done = subprocess.run([sys.executable, "-c", PEAKS, *words], capture_output=True, text=True, check=True)
    rows, held, peaks = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert rows == counts and all(size < 300 * count for size, count in zip(held, rows, strict=True))
    assert peaks[1] - peaks[0] < 300 * (rows[1] - rows[0])


def test_an_id_is_taken_wherever_the_first_one_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "_ROWS_AT_ONCE", 3)
    first, second = manifest(tmp_path / "a.jsonl", 4), manifest(tmp_path / "b.jsonl", 6)
    found = recordings.read_manifests([first, second], inspect=facts)
    assert [row["id"] for row in found.rows] == [f"u{n:06d}" for n in range(6)]
    assert [row["path"] for row in found.rows] == [str(tmp_path / f"{n}.wav") for n in range(6)]
    assert [(p.source, p.reason) for p in found.problems] == [(f"{second}:{n}", "duplicate_id") for n in range(1, 5)]
    assert found.problems[3].detail == f"id 'u000003' is already taken by {first}:4"


def test_what_is_set_aside_takes_no_id_and_counts_in_no_split(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9").mkdir()
    there = tmp_path / "there.wav"
    there.write_bytes(b"sound")
    rows = [{"id": "a", "path": "/gone.wav"}] + [{"id": "a", "path": str(there), "split": "gold"}] * 3
    uri = tmp_path / "caf\udce9" / "m.jsonl"
    uri.write_text("\n".join(map(json.dumps, rows)))
    found = recordings.read_manifests([str(uri)])
    assert [row["path"] for row in found.rows] == [str(there)]
    assert dict(found.unknown_splits) == {"gold": 1}
    assert [problem.reason for problem in found.problems] == ["missing_file", "duplicate_id", "duplicate_id"]
    assert found.problems[2].detail.endswith("caf\\udce9/m.jsonl:2")
    assert found.quarantine().num_rows == 3


def test_text_too_long_for_one_column_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tables, "_LONGEST_TEXT", 60)
    table = pa.table({"id": ["b", "a"], "text": ["long " * 9, "long " * 9], "at": [1, 0]})
    found = row_tables.sort_by(table, "id")
    assert found["at"].to_pylist() == [0, 1]
    assert [field.type for field in found.schema] == [pa.string(), pa.large_string(), pa.int64()]
