"""Backup and restore of tracking and storage: the database's dump and every object, in one directory with their hashes.

Copied in this order, the database never names an artifact that the copy lacks: artifacts are written before the row
that names them is of use, and are never changed.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from speechgpt.runtime.stack import objects, postgres, servers, services
from speechgpt.runtime.stack.layout import BUCKETS, Layout, StackError

_DUMP, _OBJECTS, _LIST = "mlflow.dump", "objects", "backup.json"


def backup(layout: Layout, destination: Path) -> int:
    """Write a backup of the running stack into a new directory; returns the number of objects. Raises StackError."""
    if not all(services.status(layout).values()):
        raise StackError("the stack does not run: speechgpt stack up")
    if destination.exists() and any(destination.iterdir()):
        raise StackError(f"{destination} is not empty: name a new directory")
    destination.mkdir(parents=True, exist_ok=True)
    postgres.dump(layout, destination / _DUMP)
    count = objects.save(services.s3_client(layout), BUCKETS, destination / _OBJECTS)
    files = {str(path.relative_to(destination)): _sha256(path) for path in destination.rglob("*") if path.is_file()}
    made = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "files": files}
    (destination / _LIST).write_text(json.dumps(made, indent=1))
    return count


def restore(layout: Layout, source: Path) -> int:
    """Put a backup in place of what the running stack holds; returns the number of objects.

    Raises StackError, with nothing changed, for a directory that is not a whole backup.
    """
    check(source)
    status = services.status(layout)
    if not (status["postgres"] and status[services.S3]):
        raise StackError("the stack does not run: speechgpt stack up")
    # MLflow holds connections, and locks, on what is replaced.
    servers.stop(layout.directory, services.MLFLOW)
    postgres.load(layout, source / _DUMP)
    count = objects.load(services.s3_client(layout), source / _OBJECTS)
    services.start_mlflow(layout)
    return count


def check(source: Path) -> None:
    """Raises StackError unless every file is there and unchanged."""
    try:
        files = json.loads((source / _LIST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise StackError(f"{source} is not a whole backup: it has no readable {_LIST}") from None
    for name, digest in files.items():
        path = source / name
        if not path.is_file() or _sha256(path) != digest:
            raise StackError(f"{path} is missing or was changed since the backup was made: take another backup")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
