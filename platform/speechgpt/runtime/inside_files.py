"""Sounds inside larger files, by an address that any worker can read alone.

shard.tar#bytes=1536-33535           a range of bytes, as HTTP writes it: a tar's member, a cell of an Arrow file
part.parquet#row=12&column=audio     a cell of a Parquet file: bytes, or {bytes, path} as Hugging Face writes them
hour.flac#t=1.5,4.75&channel=0       a stretch of a sound, in seconds, as W3C media fragments write it
"""

import io
import math
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any, Protocol
from urllib.parse import quote, unquote

_PLACE = re.compile(
    r"#(?:bytes=(?P<first>\d+)-(?P<last>\d+)"
    r"|row=(?P<row>\d+)&column=(?P<column>[^&#]+)"
    r"|t=(?P<start>\d+(?:\.\d+)?),(?P<stop>\d+(?:\.\d+)?)(?:&channel=(?P<channel>\d+))?)$"
)


_READ_AHEAD = 256 << 10
"""Bytes: libsndfile asks for a few at a time, and each time a store would be asked."""


class PlaceError(OSError):
    """An address whose file is there and has no sound at that place."""


class Place(Protocol):
    """Where in a file."""

    def read(self, name: str, file: IO[bytes]) -> bytes | str:
        """A sound file's bytes, or the name of the file that has them. Raises PlaceError if the place is not there."""


@dataclass(frozen=True)
class ByteRange:
    first: int
    count: int

    def __str__(self) -> str:
        return f"#bytes={self.first}-{self.first + self.count - 1}"

    def read(self, name: str, file: IO[bytes]) -> bytes:
        file.seek(self.first)
        data = file.read(self.count)
        if len(data) < self.count:
            raise PlaceError(f"{name}{self}: the file ends {self.count - len(data)} bytes before the sound does")
        return data


@dataclass(frozen=True)
class Cell:
    """A cell of a Parquet file. row: from 0, over all row groups."""

    row: int
    column: str

    def __str__(self) -> str:
        return f"#row={self.row}&column={quote(self.column)}"

    def read(self, name: str, file: IO[bytes]) -> bytes | str:
        value = _ROW_GROUPS.cell(name, file, self)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes | str):
            raise PlaceError(f"{name}{self}: holds neither the bytes of a sound nor a path")
        return value


@dataclass(frozen=True)
class Stretch:
    """Part of a sound, in seconds; of one channel, or of all of them."""

    start: float
    stop: float
    channel: int | None = None

    def __str__(self) -> str:
        channel = "" if self.channel is None else f"&channel={self.channel}"
        return f"#t={_decimal(self.start)},{_decimal(self.stop)}{channel}"

    def read(self, name: str, file: IO[bytes]) -> bytes:
        """As a WAV file of the sound's own rate; float samples, unless the sound is of 16 bits."""
        source = _Source(file)
        try:
            return self._wav(name, io.BufferedReader(source, _READ_AHEAD))
        finally:
            if source.fault is not None:
                raise source.fault from None

    def _wav(self, name: str, file: IO[bytes]) -> bytes:
        import soundfile

        try:
            with soundfile.SoundFile(file) as sound:
                rate, subtype = sound.samplerate, "PCM_16" if sound.subtype == "PCM_16" else "FLOAT"
                first, stop = (round(seconds * rate) for seconds in (self.start, self.stop))
                # Sums of rounded lengths may miss the end by a sample or two.
                slack = math.ceil(0.01 * rate)
                if stop > sound.frames + slack:
                    raise PlaceError(f"{name}{self}: the sound is {sound.frames / rate:.2f} s long")
                if self.channel is not None and self.channel >= sound.channels:
                    raise PlaceError(f"{name}{self}: the sound has {sound.channels} channels, counted from 0")
                sound.seek(first)
                samples = sound.read(stop - first, dtype="float32", always_2d=True)
                if len(samples) < stop - first - slack:
                    raise PlaceError(f"{name}{self}: the file ends after {len(samples) / rate:.2f} s of it")
        except soundfile.LibsndfileError:
            raise PlaceError(f"{name}{self}: not a sound file, or not whole") from None
        wav = io.BytesIO()
        kept = samples if self.channel is None else samples[:, self.channel]
        soundfile.write(wav, kept, rate, format="WAV", subtype=subtype)
        return wav.getvalue()


class _Source(io.RawIOBase):
    """A file for libsndfile, to which an error of a read is the file's end: `fault` is the first one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.fault: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            self.fault = self.fault or error
            return 0
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def split(address: str) -> tuple[str, ByteRange | Cell | Stretch | None]:
    """The file, and the place inside it if the address has one; a `#` in a file's own name does no harm."""
    found = _PLACE.search(address)
    if found is None:
        return address, None
    name, part = address[: found.start()], found.groupdict()
    if part["first"]:
        return name, ByteRange(int(part["first"]), int(part["last"]) - int(part["first"]) + 1)
    if part["row"]:
        return name, Cell(int(part["row"]), unquote(part["column"]))
    channel = None if part["channel"] is None else int(part["channel"])
    return name, Stretch(float(part["start"]), float(part["stop"]), channel)


def _decimal(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


class _RowGroups:
    """The columns of the last few row groups: neighbouring rows are read one after the other, by several threads."""

    def __init__(self, kept: int = 2) -> None:
        self._kept = kept
        self._columns: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def cell(self, name: str, file: IO[bytes], cell: Cell) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._lock:
            for key, (first, column) in self._columns.items():
                if key[0] == name and key[2] == cell.column and first <= cell.row < first + len(column):
                    return column[cell.row - first].as_py()
            try:
                table = pq.ParquetFile(file)
                if cell.column not in table.schema_arrow.names:
                    raise PlaceError(f"{name}: no column {cell.column!r}; it has {table.schema_arrow.names}")
                first = 0
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if cell.row < first + rows:
                        column = table.read_row_group(group, [cell.column]).column(0)
                        self._columns[name, group, cell.column] = first, column
                        while len(self._columns) > self._kept:
                            self._columns.popitem(last=False)
                        return column[cell.row - first].as_py()
                    first += rows
            except pa.ArrowInvalid as error:
                raise PlaceError(f"{name}: not a Parquet file: {error}") from None
        raise PlaceError(f"{name}{cell}: the table has {first} rows")


_ROW_GROUPS = _RowGroups()
