"""Large files by lines: every line once, in memory that does not grow with the file."""

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechgpt.runtime import line_ranges
from speechgpt.runtime.line_ranges import LineFileError, cut, read

lines = st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=30)


def expected(content: bytes) -> list[tuple[int, bytes]]:
    numbered = enumerate(content.split(b"\n"), 1)
    stripped = [(number, line.rstrip(b"\r")) for number, line in numbered]
    if stripped:
        stripped[0] = (1, stripped[0][1].removeprefix(b"\xef\xbb\xbf"))
    return [(number, line) for number, line in stripped if line.strip()]


def all_lines(file: Path, size: int) -> list[tuple[int, bytes]]:
    return [line for _, some in read(str(file), list(cut(str(file), size))) for line in some]


@pytest.mark.parametrize("compressed", [False, True])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=lines, size=st.integers(1, 100), ends=st.booleans(), mark=st.booleans(), return_=st.booleans())
def test_every_line_once_with_its_number(tmp_path, compressed, made, size, ends, mark, return_):
    end = b"\r\n" if return_ else b"\n"
    content = b"\xef\xbb\xbf" * mark + end.join(made) + end * ends
    file = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    file.write_bytes(gzip.compress(content) if compressed else content)
    assert all_lines(file, size) == expected(content)
    ranges = list(cut(str(file), size))
    assert sum(each.length for each in ranges) == len(content)
    assert all(each.length >= size for each in ranges[:-1])
    assert [each.first_line for each in ranges[1:]] == [each.first_line + each.lines for each in ranges[:-1]]
    apart = [line for each in reversed(ranges) for _, some in read(str(file), [each]) for line in some]
    assert sorted(apart) == sorted(expected(content)), "a range can be read without those before it"


def test_equal_content_gives_equal_ranges_compressed_or_not(tmp_path):
    content = b"".join(b"line %d\n" % n for n in range(50_000))
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    ranges = list(cut(str(plain), 100_000))
    assert ranges == list(cut(str(packed), 100_000))
    assert len(ranges) == 6


def test_a_file_that_changed_meanwhile_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\ntwo\n")
    ranges = list(cut(str(file), 4))
    file.write_bytes(b"one\ntoo\n")
    with pytest.raises(LineFileError, match=r"a\.txt changed while it was read, at line 2"):
        [list(some) for _, some in read(str(file), ranges)]


def test_a_file_without_lines_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(line_ranges, "LONGEST_LINE", 3 << 20)
    file = tmp_path / "a.json"
    file.write_bytes(b"[1]\n[2]\n" + b"[" * (8 << 20))
    with pytest.raises(LineFileError, match=r"a\.json, line 3: longer than 3 MiB.*jq"):
        list(cut(str(file), 1 << 20))


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(bytes(range(256)) * 400)[:200]])
def test_broken_compression_is_told(tmp_path, content):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(content)
    with pytest.raises(LineFileError, match=r"a\.txt\.gz: broken gzip"):
        list(cut(str(file), 1 << 20))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(cut(str(tmp_path / "none.txt"), 10))


def test_files_in_a_bucket(s3_bucket, tmp_path):
    import boto3

    content = b"".join(b"line %d\n" % n for n in range(1000))
    bucket = boto3.resource("s3").Bucket(s3_bucket)
    for name, body in {"a.txt": content, "a.txt.gz": gzip.compress(content)}.items():
        bucket.put_object(Key=f"data/{name}", Body=body)
        file = f"s3://{s3_bucket}/data/{name}"
        ranges = list(cut(file, 2000))
        assert len(ranges) > 3
        assert [line for _, some in read(file, ranges[2:]) for line in some] == expected(content)[
            ranges[2].first_line - 1 :
        ]
