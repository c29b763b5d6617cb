"""Files wherever they are: in a directory, `s3://`, `package:` (shipped with this package), or inside a larger file."""

import io
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, NamedTuple, cast

from speechgpt.runtime import buckets, inside_files
from speechgpt.runtime.patience import patiently

PACKAGE = "package:"
"""Scheme of files that come with this package: the same name on every machine, wherever it is installed."""


_PIECE = 16 << 20
"""Bytes of one request to a store."""


class StoreError(OSError):
    """A store that refused or did not answer, although asked again and again: no fault of the file that was wanted."""


class FileFact(NamedTuple):
    """A file as a listing shows it. changed: nanoseconds since the epoch."""

    uri: str
    size: int
    changed: int


def read_bytes(path: str) -> bytes:
    """The bytes of a local file, an `s3://` object, a `package:` file, or of a place inside one of them.

    Raises FileNotFoundError, PlaceError for a place (see `inside_files`) that is not in the file, and StoreError.
    """

    def read() -> bytes:
        with open_binary(path) as file:
            return file.read()

    return patiently(read, StoreError) if path.startswith("s3://") else read()


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """The same files open for reading, for those too large to hold; seekable. Raises as `read_bytes` does."""
    name, place = inside_files.split(path)
    if place is not None:
        yield io.BytesIO(_read_place(name, place))
        return
    with _open_whole(path) as file:
        yield file


@contextmanager
def open_local(path: str) -> Iterator[IO[bytes]]:
    """The same files, an object of a store from a copy on this machine's disk: read line by line, it would be asked for
    8 KiB at a time, and not patiently. Raises as `read_bytes` does."""
    if not path.startswith("s3://"):
        with open_binary(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:

        def fetch() -> None:
            copy.seek(0)
            copy.truncate()
            with open_binary(path) as file:
                shutil.copyfileobj(file, copy, _PIECE)

        patiently(fetch, StoreError)
        copy.seek(0)
        yield copy


def files_under(uri: str) -> list[FileFact]:
    """The file of that name, or every file below that directory or prefix, by name. Empty if there is none."""
    if uri.startswith("s3://"):
        address = uri.removeprefix("s3://").rstrip("/")
        return sorted(FileFact(f"s3://{name}", size, changed) for name, size, changed in buckets.facts(address))
    top = Path(absolute(uri))
    if top.is_file():
        return [_fact(top)]
    found = (Path(folder, name) for folder, _, names in os.walk(top, followlinks=True) for name in names)
    # A link that leads nowhere is no file; whoever names it is told when its row is read.
    return sorted(_fact(file) for file in found if file.is_file())


def absolute(uri: str) -> str:
    """A local path from the root on, since workers have other working directories; other addresses as they are."""
    return uri if "://" in uri or uri.startswith(PACKAGE) else str(Path(uri).expanduser().absolute())


def joined(folder: str, path: str) -> str:
    """The address of a path that a file in `folder` names: as it is if it is a whole one, else from there on."""
    if "://" in path or path.startswith("/"):
        return path
    scheme, separator, place = folder.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(place, path))


@contextmanager
def _open_whole(path: str) -> Iterator[IO[bytes]]:
    if path.startswith(PACKAGE):
        with resources.files("speechgpt").joinpath(path.removeprefix(PACKAGE)).open("rb") as packaged:
            yield packaged
    elif path.startswith("s3://"):
        address = path.removeprefix("s3://")
        try:
            with buckets.filesystem(f"s3://{address.partition('/')[0]}").open_input_file(address) as remote:
                yield cast("IO[bytes]", remote)
        except (FileNotFoundError, inside_files.PlaceError):
            raise
        except OSError as error:
            # What Arrow raises of S3 has no number; what is raised where the file is used (a full disk) has one.
            if error.errno is not None or isinstance(error, StoreError | io.UnsupportedOperation):
                raise
            raise StoreError(f"{path}: {error}") from None
    else:
        with Path(path).open("rb") as local:
            yield local


def _read_place(name: str, place: inside_files.Place) -> bytes:
    with _open_whole(name) as file:
        found = place.read(name, file)
    if isinstance(found, bytes):
        return found
    # A table's row that names a file instead of holding its bytes.
    return read_bytes(joined(posixpath.dirname(name), found))


def _fact(file: Path) -> FileFact:
    facts = file.stat()
    return FileFact(str(file), facts.st_size, facts.st_mtime_ns)
