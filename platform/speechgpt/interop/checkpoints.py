"""Reads torch checkpoints and joblib files as plain data: tensors, arrays, containers, configuration. Runs nothing.

Three containers (torch/serialization.py, joblib/numpy_pickle.py):
  zip     `NAME/data.pkl` and `NAME/data/KEY`, one stored entry for each storage; since torch 1.6
  legacy  five pickles (magic number, version, system, the object, keys of the storages), then each storage's length and
          bytes
  joblib  one pickle with the arrays' bytes inside it, plain or compressed as a whole
"""

import bz2
import lzma
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from speechgpt.interop.allowed import CHECKPOINTS, CONFIGURATION_OBJECTS
from speechgpt.interop.arrays import STORAGES, Storage
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.pickles import Name, PickleError, Record, RefusedError, load
from speechgpt.interop.source import Source

MAX_DECOMPRESSED = 2 << 30
"""Bytes that a compressed joblib file may become."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ZIP = b"PK\x03\x04"
_LOOKS_LIKE = {
    b"<": "a web page or XML: the download went wrong",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"ZF": "a joblib file of a version before 0.10: load it there and save it again",
    b"\x04\x22\x4d\x18": "compressed with LZ4: unpack it first (`lz4 -d`)",
    b"\x93NUMPY": "a numpy array, not a pickled model",
    b"RIFF": "a wav file",
}


class CheckpointError(ConversionError):
    """A file that cannot be read; the message names it and says why."""


class RefusedCheckpointError(CheckpointError):
    """A file that asks for more than data."""


def read(path: str | os.PathLike) -> Any:
    """All that a checkpoint holds. Tensors are views of the file, so leave it in place while they are used.

    Raises CheckpointError for a file that is no checkpoint, damaged or cut off, RefusedCheckpointError naming the
    global that a pickle asked for and may not have.
    """
    path = Path(path)
    data = _mapped(path)
    try:
        return _read(data)
    except RefusedError as error:
        raise RefusedCheckpointError(
            f"{path}: refused, for {error}; a checkpoint needs tensors and plain configuration only; nothing "
            "of this file was run"
        ) from None
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from None


def plain(value: Any, depth: int = 32) -> Any:
    """Configuration objects (Namespace, omegaconf, fairseq's enumerations) as dicts, lists and values.

    Other records stay as they are. Raises CheckpointError for one nested more than `depth` deep.
    """
    if depth == 0:
        raise CheckpointError("the configuration is nested too deeply to be one")
    if isinstance(value, Name):
        return value.path
    if isinstance(value, dict):
        return {name: plain(inner, depth - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth - 1) for inner in value]
    if not isinstance(value, Record) or not CONFIGURATION_OBJECTS.fullmatch(value.kind):
        return value
    if value.args:
        # An enumeration's member is pickled as its class called with the value.
        return plain(value.args[0], depth - 1)
    state = value.state if isinstance(value.state, dict) else {}
    for held in ("_content", "_val"):
        if held in state:
            return plain(state[held], depth - 1)
    return plain(state, depth - 1)


def _mapped(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            # Copied on write, so that a tensor made of it may be changed and the file may not.
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except ValueError:
        raise CheckpointError(f"{path}: the file is empty") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _read(data: memoryview) -> Any:
    start = bytes(data[:64])
    if start[:4] == _ZIP:
        return _read_zip(data)
    if unpacker := _unpacker(start):
        return _read_pickle(memoryview(_unpacked(data, unpacker)))
    for prefix, meaning in _LOOKS_LIKE.items():
        if start.lstrip().startswith(prefix):
            raise PickleError(f"no checkpoint but {meaning}")
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < len(data):
        raise PickleError("a safetensors file: there is nothing to convert, it is read as it is")
    return _read_pickle(data)


def _read_pickle(data: memoryview) -> Any:
    source = Source(data)
    first = load(source, CHECKPOINTS)
    if first == _LEGACY_MAGIC and isinstance(first, int):
        return _read_legacy(source)
    if source.left:
        raise PickleError(f"{source.left} bytes follow the end of the pickle: damaged, or not made by joblib")
    return first


# torch's zip.


def _read_zip(data: memoryview) -> Any:
    entries = _zip_entries(data)
    pickled = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickled) != 1:
        raise PickleError("a zip archive, but not torch's: it has no NAME/data.pkl")
    prefix = pickled[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise PickleError("a TorchScript program: it holds code; give the checkpoint that it was made from")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(order) != b"little":
        raise PickleError(f"numbers in {bytes(order)!r:.20} byte order; save it again on a little-endian machine")

    kept: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        words = _identity(identity)
        if words.key not in kept:
            name = f"{prefix}data/{words.key}"
            if name not in entries:
                raise PickleError(f"damaged: the archive lacks {name}")
            kept[words.key] = _storage(words, entries[name])
        return _of_one_type(kept[words.key], words)

    return load(Source(entries[pickled[0]]), CHECKPOINTS, storage)


def _zip_entries(data: memoryview) -> dict[str, memoryview]:
    """{name: bytes}, by their checksums. Only stored entries with names that stay inside the archive."""
    try:
        with zipfile.ZipFile(_SeekableView(data)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, LookupError, struct.error):
        raise PickleError("cut off or damaged: the archive's directory at its end cannot be read") from None
    entries: dict[str, memoryview] = {}
    for info in infos:
        name = info.orig_filename
        if name in entries:
            raise RefusedError(f"two entries of the archive named {name!r:.80}")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise RefusedError(f"an entry of the archive named {name!r:.80}, outside of it")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise RefusedError(f"a compressed or encrypted entry {name!r:.80}; torch stores them as they are")
        entries[name] = _zip_entry(data, info)
    return entries


def _zip_entry(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    header = Source(data)
    header.position = info.header_offset
    try:
        words = struct.unpack("<4s22x2H", header.take(30))
        header.take(words[1] + words[2])
        content = header.take(info.file_size)
    except (ValueError, struct.error):
        raise PickleError(f"cut off or damaged: the archive's entry {info.filename!r:.80} is not whole") from None
    if words[0] != _ZIP:
        raise PickleError(f"damaged: no archive entry where {info.filename!r:.80} should be")
    if zlib.crc32(content) != info.CRC:
        raise PickleError(f"damaged: the checksum of {info.filename!r:.80} does not hold")
    return content


class _SeekableView:
    """A buffer as the file that `zipfile` wants, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._source = Source(data)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._source.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = (0, self._source.position, len(self._source.data))[whence]
        if origin + offset < 0:
            raise OSError("before the start")
        self._source.position = min(origin + offset, len(self._source.data))
        return self._source.position

    def read(self, count: int = -1) -> bytes:
        return self._source.read(self._source.left if count < 0 else count)


# torch's legacy stream.


def _read_legacy(source: Source) -> Any:
    version = load(source, CHECKPOINTS)
    if version != _LEGACY_VERSION:
        raise PickleError(f"a torch file of version {version!r:.20}; {_LEGACY_VERSION} is read")
    system = load(source, CHECKPOINTS)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("numbers in big-endian order; save it again on a little-endian machine")
    start = source.position
    identities: dict[str, _Identity] = {}

    def noted(identity: Any) -> Storage:
        words = _identity(identity)
        identities[words.key] = words
        return Storage(words.dtype, words.numbers, None)

    # The storages stand behind the object that names their types, so it is read twice: for their places, and with them.
    load(source, CHECKPOINTS, noted)
    places: dict[str, memoryview] = {}
    for key in load(source, CHECKPOINTS):
        if key not in identities:
            raise PickleError(f"damaged: a storage {key!r:.40} that nothing refers to")
        try:
            (count,) = struct.unpack("<q", source.take(8))
            places[key] = source.take(count * identities[key].dtype.itemsize)
        except ValueError as error:
            raise PickleError(f"cut off: {error} for a storage") from None
    kept: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        words = _identity(identity)
        if words.key not in places:
            raise PickleError(f"damaged: the storage {words.key!r:.40} is not in the file")
        if words.key not in kept:
            kept[words.key] = _storage(words, places[words.key])
        return _of_one_type(kept[words.key], words)

    source.position = start
    return load(source, CHECKPOINTS, storage)


class _Identity(NamedTuple):
    dtype: Any
    key: str
    numbers: int


def _identity(words: Any) -> _Identity:
    """("storage", type, key, device, count), in the legacy format with a sixth that is None."""
    if not isinstance(words, tuple) or len(words) not in (5, 6) or words[0] != "storage":
        raise RefusedError(f"a persistent id that is no storage: {words!r:.80}")
    kind, key, count = words[1], words[2], words[4]
    if not isinstance(kind, Name) or kind.path not in STORAGES:
        raise RefusedError(f"a storage of type {kind!s:.60}")
    if not isinstance(key, str) or not key.isascii() or not key.isdigit():
        raise RefusedError(f"a storage with the name {key!r:.60}; torch numbers them")
    if not isinstance(count, int) or count < 0:
        raise PickleError(f"damaged: a storage of {count!r:.40} numbers")
    if len(words) == 6 and words[5] is not None:
        raise PickleError("a torch file with shared views of storages (torch 0.3): save it again with a newer torch")
    return _Identity(STORAGES[kind.path], key, count)


def _storage(words: _Identity, data: memoryview) -> Storage:
    return Storage(words.dtype, words.numbers, data)


def _of_one_type(storage: Storage, words: _Identity) -> Storage:
    if (storage.dtype, storage.count) != (words.dtype, words.numbers):
        raise PickleError(f"damaged: the storage {words.key} has two types or sizes")
    return storage


# joblib's compression.


class _Unpacker(NamedTuple):
    name: str
    start: Callable[[], Any]


def _unpacker(start: bytes) -> _Unpacker | None:
    if start[:1] == b"\x78":
        return _Unpacker("zlib", zlib.decompressobj)
    if start[:2] == b"\x1f\x8b":
        return _Unpacker("gzip", lambda: zlib.decompressobj(zlib.MAX_WBITS | 16))
    if start[:3] == b"BZh":
        return _Unpacker("bzip2", bz2.BZ2Decompressor)
    if start[:6] == b"\xfd7zXZ\0" or start[:3] == b"\x5d\0\0":
        # A header may ask for a dictionary of gigabytes.
        return _Unpacker("lzma", lambda: lzma.LZMADecompressor(memlimit=512 << 20))
    return None


def _unpacked(data: memoryview, unpacker: _Unpacker) -> bytes:
    engine = unpacker.start()
    result = bytearray()
    try:
        for start in range(0, len(data), 1 << 16):
            piece = bytes(data[start : start + (1 << 16)])
            while True:
                got = engine.decompress(piece, 1 << 20)
                result += got
                if len(result) > MAX_DECOMPRESSED:
                    raise RefusedError(f"its {unpacker.name} data, which becomes more than {MAX_DECOMPRESSED} bytes")
                piece = getattr(engine, "unconsumed_tail", b"")
                if engine.eof or not (piece or len(got) == 1 << 20):
                    break
            if engine.eof:
                break
    except (zlib.error, OSError, lzma.LZMAError, MemoryError) as error:
        raise PickleError(f"damaged, or not {unpacker.name} data ({error})") from None
    if not engine.eof:
        raise PickleError(f"cut off: its {unpacker.name} data does not end")
    return bytes(result)
