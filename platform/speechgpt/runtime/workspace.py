"""The place where one run keeps everything it makes: a directory, or a prefix of an S3 bucket, through the same calls.

Names inside a workspace (`rel`) are relative POSIX paths such as `units/part-0.parquet`. What a reader can see is
whole: files appear by one rename (or one S3 object), directories by `stage`. One writer for each name at a time.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from speechgpt.runtime import buckets
from speechgpt.runtime.patience import patiently

STAGING = ".staging"
"""Where a local workspace keeps what is not whole yet; no listing shows it."""

_CHUNK = 1 << 20

T = TypeVar("T")


class WorkspaceError(OSError):
    """A workspace that cannot be reached, or a name in it that is missing or not allowed."""


class Workspace:
    """A directory or `s3://bucket/prefix`. Travels to Ray workers as its URI."""

    uri: str
    fs: pafs.FileSystem

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        is_bucket = text.startswith("s3://")
        text = text.rstrip("/")
        if is_bucket:
            self.uri, self._base, self.remote = text, text.removeprefix("s3://"), True
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]+(/.+)?", self._base):
                raise WorkspaceError(f"workspace {uri!r}: expected s3://bucket/prefix")
            self.fs = buckets.filesystem(text)
        elif "://" in text:
            raise WorkspaceError(f"workspace {uri!r}: a directory or s3://bucket/prefix is expected")
        else:
            self.uri = self._base = str(Path(text or "/").expanduser().absolute())
            self.remote = False
            self.fs = pafs.LocalFileSystem()

    def __repr__(self) -> str:
        return f"Workspace({self.uri!r})"

    def __reduce__(self) -> tuple[type["Workspace"], tuple[str]]:
        return Workspace, (self.uri,)

    # Names

    def path(self, rel: str = "") -> str:
        """Full address for other libraries (Ray Data, Ray Train, MLflow): an absolute path or s3://…"""
        return _join(self.uri, rel)

    def root(self, rel: str = "") -> str:
        """The path that belongs to `.fs`."""
        return _join(self._base, rel)

    # Reading

    def exists(self, rel: str) -> bool:
        """Whether there is a file, or a directory with at least one file, of that name."""
        if self.remote:
            return buckets.exists(self.root(rel))
        return Path(self.path(rel)).exists()

    def missing(self, names: Iterable[str]) -> set[str]:
        """Those of the names that do not `exist`; however many there are in one directory, that takes one listing."""
        if not self.remote:
            return {name for name in names if not self.exists(name)}
        absent: set[str] = set()
        by_folder: dict[str, set[str]] = {}
        for name in names:
            by_folder.setdefault(_clean(name).rpartition("/")[0], set()).add(name)
        for folder, inside in by_folder.items():
            if not folder or len(inside) == 1:
                absent |= {name for name in inside if not self.exists(name)}
                continue
            depth = folder.count("/") + 2
            there = {"/".join(file.split("/", depth)[:depth]) for file in self.list(folder)}
            absent |= {name for name in inside if _clean(name) not in there}
        return absent

    def list(self, rel: str = "") -> list[str]:
        """Every file under `rel` (or the file itself), relative to the workspace, sorted. Empty if there is none."""
        if self.remote:
            inside = f"{self._base}/"
            return sorted(key.removeprefix(inside) for key in buckets.keys(self.root(rel)))
        top = Path(self.path(rel))
        if top.is_file():
            return [_clean(rel)]
        files = (Path(folder, name) for folder, _, names in os.walk(top) for name in names)
        found = (file.relative_to(self.uri).as_posix() for file in files)
        return sorted(name for name in found if not name.startswith(f"{STAGING}/"))

    def read_bytes(self, rel: str) -> bytes:
        """Raises WorkspaceError naming the file if it is missing."""
        address = self.root(rel)

        def read() -> bytes:
            with self.fs.open_input_file(address) as file:
                return bytes(file.readall())

        try:
            return self._patiently(read)
        except FileNotFoundError:
            raise WorkspaceError(f"{self.path(rel)} is missing") from None

    def read_json(self, rel: str) -> Any:
        try:
            return json.loads(self.read_bytes(rel))
        except ValueError as error:
            raise WorkspaceError(f"{self.path(rel)} is not JSON: {error}") from None

    def read_table(self, rel: str) -> pa.Table:
        """A Parquet file, or a directory of them in the order of their names."""
        files = [name for name in self.list(rel) if name.endswith(".parquet") and not _hidden(name, rel)]
        if not files:
            raise WorkspaceError(f"{self.path(rel)} holds no Parquet file")
        tables = [pq.read_table(io.BytesIO(self.read_bytes(name)), partitioning=None) for name in files]
        return pa.concat_tables(tables, promote_options="default")

    def count_rows(self, rel: str) -> int:
        """Rows of one Parquet file, from its footer."""
        return self._parquet(rel, lambda file: file.metadata.num_rows)

    def read_rows(
        self, rel: str, first: int = 0, count: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows [first, first + count) of one Parquet file (all from `first` on); other row groups are not read."""

        def read(file: pq.ParquetFile) -> pa.Table:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            stop = sum(sizes) if count is None else first + count
            bounds = [0, *accumulate(sizes)]
            groups = [g for g in range(len(sizes)) if bounds[g] < stop and bounds[g + 1] > first]
            if not groups:
                return file.schema_arrow.empty_table()
            return file.read_row_groups(groups, columns and [*columns]).slice(first - bounds[groups[0]], stop - first)

        return self._parquet(rel, read)

    def _parquet(self, rel: str, work: Callable[[pq.ParquetFile], T]) -> T:
        address = self.root(rel)

        def read() -> T:
            with self.fs.open_input_file(address) as file:
                return work(pq.ParquetFile(file))

        try:
            return self._patiently(read)
        except FileNotFoundError:
            raise WorkspaceError(f"{self.path(rel)} is missing") from None

    def _patiently(self, work: Callable[[], T]) -> T:
        return patiently(work) if self.remote else work()

    def digest(self, rel: str) -> str:
        """sha256 over the sorted (name, sha256 of content) of the files under `rel`, names relative to it.

        Markers (`_done/`) do not count: they say who made the content, and change without it.
        """
        names = [name for name in self.list(rel) if "_done" not in PurePosixPath(name).parts]
        if not names:
            raise WorkspaceError(f"{self.path(rel)} is missing")
        total = hashlib.sha256()
        for name in names:
            inside = name.removeprefix(_clean(rel)).removeprefix("/")
            total.update(f"{inside}\0{self._content_digest(name)}\n".encode())
        return total.hexdigest()

    @contextmanager
    def fetch(self, rel: str) -> Iterator[Path]:
        """The file or directory as a local path: itself, or from S3 a download that lasts as long as the block."""
        if not self.exists(rel):
            raise WorkspaceError(f"{self.path(rel)} is missing")
        if not self.remote:
            yield Path(self.path(rel))
            return
        with tempfile.TemporaryDirectory(prefix="speechgpt-fetch-") as folder:
            target = Path(folder, PurePosixPath(_clean(rel)).name)
            buckets.download(self.fs, self.root(rel), target)
            yield target

    # Writing

    def write_bytes(self, rel: str, content: bytes) -> None:
        """Replaces the file at once: a reader sees the old content or the new, whatever happens to this process.

        Raises WorkspaceError where the store does not take it.
        """
        if self.remote:
            address = self.root(rel)

            def write() -> None:
                with self.fs.open_output_stream(address) as stream:
                    stream.write(content)

            try:
                patiently(write)
            except OSError as error:
                raise WorkspaceError(f"{self.path(rel)} was not taken: {error}") from error
            return
        target = Path(self.path(rel))
        with self._unfinished() as draft:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)

    def write_json(self, rel: str, value: Any) -> None:
        self.write_bytes(rel, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def write_table(self, rel: str, table: pa.Table, group_rows: int | None = None) -> None:
        """One Parquet file, replaced at once. group_rows: how many rows `read_rows` has to read for one of them."""
        if self.remote:
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd", row_group_size=group_rows)
            self.write_bytes(rel, buffer.getvalue())
            return
        target = Path(self.path(rel))
        with self._unfinished() as draft:
            pq.write_table(table, draft, compression="zstd", row_group_size=group_rows)
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(target)

    @contextmanager
    def stage(self, rel: str) -> Iterator[Path]:
        """An empty local directory to fill; it becomes `rel`, in place of what was there, only if the block ends well.

        Locally that is a rename. S3 has none: the objects are uploaded, those of the top level last (an index such as
        bundle.json stands there), then what the old directory had more is deleted.
        """
        if self.remote:
            with tempfile.TemporaryDirectory(prefix="speechgpt-stage-") as folder:
                yield Path(folder)
                buckets.replace(self.fs, Path(folder), self.root(rel))
            return
        target = Path(self.path(rel))
        with self._unfinished() as draft:
            draft.mkdir()
            yield draft
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._unfinished() as old:
                if target.exists():
                    target.rename(old)
                draft.rename(target)

    def delete(self, rel: str) -> None:
        """The file or tree; nothing happens if there is none."""
        if not _clean(rel):
            raise WorkspaceError(
                "a whole workspace is not deleted by name; remove its directory or bucket prefix yourself"
            )
        if self.remote:
            buckets.delete(self.root(rel))
            return
        _remove(Path(self.path(rel)))

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A free name on the workspace's own file system; whatever is left there at the end is removed."""
        folder = Path(self.uri, STAGING)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / uuid.uuid4().hex
        try:
            yield draft
        finally:
            _remove(draft)

    def _content_digest(self, rel: str) -> str:
        address = self.root(rel)

        def read() -> str:
            digest = hashlib.sha256()
            with self.fs.open_input_stream(address) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            return digest.hexdigest()

        return self._patiently(read)


def _clean(rel: str) -> str:
    parts = PurePosixPath(rel).parts
    if ".." in parts or rel.startswith("/"):
        raise WorkspaceError(f"{rel!r} is not a name inside a workspace: relative, without '..'")
    return "/".join(parts)


def _join(base: str, rel: str) -> str:
    name = _clean(rel)
    return f"{base}/{name}" if name else base


def _hidden(name: str, top: str) -> bool:
    """Markers and drafts (`_done/…`, `.x`) are not data, by the convention of Arrow, Spark and Ray Data."""
    inside = PurePosixPath(name).relative_to(_clean(top))
    return any(part[0] in "._" for part in inside.parts)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
