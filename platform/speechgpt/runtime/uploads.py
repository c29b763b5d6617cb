"""Files put into a file system that may be remote, and may refuse at times: tried again, and looked at when there."""

import logging
import shutil
import time
from pathlib import Path

import pyarrow.fs as pafs

_ATTEMPTS = 6
_FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long, half a minute in all."""
_CHUNK = 16 << 20

logger = logging.getLogger(__name__)


def put(file: Path, fs: pafs.FileSystem, address: str) -> None:
    """Copy a file to `address` of `fs`, in place of what is there, and see that all of it has arrived.

    Tries again for half a minute; raises OSError naming the file and the storage's reason if that does not help.
    """
    pause = _FIRST_PAUSE
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _copy(file, fs, address)
            return
        except FileNotFoundError:
            raise
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise OSError(f"{address} was not taken in {_ATTEMPTS} attempts: {error}") from error
            logger.warning("%s, attempt %d: %s; again in %g s", address, attempt, error, pause)
        time.sleep(pause)
        pause *= 2


def _copy(file: Path, fs: pafs.FileSystem, address: str) -> None:
    # Not pyarrow's copy_files: it drops the errors that come when S3 is given the last piece, and all else looks well.
    with file.open("rb") as source, fs.open_output_stream(address) as target:
        shutil.copyfileobj(source, target, _CHUNK)
    arrived, expected = fs.get_file_info(address).size or 0, file.stat().st_size
    if arrived != expected:
        raise OSError(f"{arrived} bytes of {expected} have arrived")
