"""Files put into a file system that may be remote, and may refuse at times: tried again, and looked at when there."""

import shutil
from pathlib import Path

import pyarrow.fs as pafs

from speechgpt.runtime.patience import patiently

_CHUNK = 16 << 20


def put(file: Path, fs: pafs.FileSystem, address: str) -> None:
    """Copy a file to `address` of `fs`, in place of what is there, and see that all of it has arrived.

    Patient with what may pass; raises OSError naming the file and the storage's reason if that does not help.
    """
    try:
        patiently(lambda: _copy(file, fs, address))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(f"{address} was not taken: {error}") from error


def _copy(file: Path, fs: pafs.FileSystem, address: str) -> None:
    # Not pyarrow's copy_files: it drops the errors that come when S3 is given the last piece, and all else looks well.
    with file.open("rb") as source, fs.open_output_stream(address) as target:
        shutil.copyfileobj(source, target, _CHUNK)
    arrived, expected = fs.get_file_info(address).size or 0, file.stat().st_size
    if arrived != expected:
        raise OSError(f"{arrived} bytes of {expected} have arrived")
