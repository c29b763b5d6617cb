"""Large text files by lines: cut into ranges of whole lines that can be read apart, in bounded memory.

Local, `s3://` and `package:` files, plain or `.gz`. A plain file's range is read alone; a compressed one has to be
read from its start, so that its ranges are best read in one go (`read` does).
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple, cast

from speechgpt.runtime.files import open_binary

LONGEST_LINE = 16 << 20
"""Bytes; a longer line is not a row but a sign of another format."""
_CHUNK = 1 << 20


class LineFileError(OSError):
    """A file that cannot be read by lines; the message names the file, the line and what to do."""


class LineRange(NamedTuple):
    """Consecutive whole lines of a file. start, length: bytes of the uncompressed text; first_line counts from 1."""

    first_line: int
    lines: int
    start: int
    length: int
    sha256: str


def cut(file: str, size: int) -> Iterator[LineRange]:
    """The ranges of a file, each of about `size` bytes: it ends with the first line that reaches them.

    Equal content gives equal ranges. Raises LineFileError for a line longer than LONGEST_LINE, OSError for a file that
    is missing or broken.
    """
    number, start = 1, 0
    for block in _blocks(file, size):
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        yield LineRange(number, lines, start, len(block), hashlib.sha256(block).hexdigest())
        number, start = number + lines, start + len(block)


def read(file: str, ranges: Sequence[LineRange]) -> Iterator[tuple[LineRange, Iterator[tuple[int, bytes]]]]:
    """Each range, in the order of the file, with its (line number, line without its end); blank lines are left out.

    A mark of byte order before the first line is no part of it. Raises LineFileError when the file has changed since
    it was cut.
    """
    with _opened(file) as stream:
        at = 0
        for each in sorted(ranges, key=lambda one: one.start):
            at = _skip(stream, at, each.start)
            block = stream.read(each.length)
            at += len(block)
            if hashlib.sha256(block).hexdigest() != each.sha256:
                raise LineFileError(f"{file} changed while it was read, at line {each.first_line} or after; run again")
            yield each, _numbered(block, each.first_line)


def _blocks(file: str, size: int) -> Iterator[bytes]:
    """The content, cut behind line ends."""
    number = 1
    held = bytearray()
    with _opened(file) as stream:
        while chunk := _next(stream, file, number):
            searched = len(held)
            held += chunk
            while (end := held.find(b"\n", max(size - 1, searched))) >= 0:
                block = bytes(held[: end + 1])
                del held[: end + 1]
                searched = 0
                number += block.count(b"\n")
                yield block
            if len(held) > size and len(held) - held.rfind(b"\n") > LONGEST_LINE:
                raise LineFileError(
                    f"{file}, line {number + held.count(10)}: longer than {LONGEST_LINE >> 20} MiB; one row a line is "
                    "expected (a JSON array becomes that by: jq -c '.[]')"
                )
    if held:
        yield bytes(held)


def _next(stream: IO[bytes], file: str, number: int) -> bytes:
    try:
        return stream.read(_CHUNK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LineFileError(f"{file}: broken gzip, after about line {number}: {error}") from None


def _numbered(block: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(io.BytesIO(block), first):
        line = line.rstrip(b"\r\n")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _skip(stream: IO[bytes], at: int, target: int) -> int:
    if stream.seekable() and not isinstance(stream, gzip.GzipFile):
        stream.seek(target)
        return target
    while at < target and (chunk := stream.read(min(_CHUNK, target - at))):
        at += len(chunk)
    return at


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """The uncompressed content."""
    with open_binary(file) as raw:
        if not file.endswith(".gz"):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("IO[bytes]", stream)
