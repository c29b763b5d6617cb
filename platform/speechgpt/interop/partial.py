"""A download that is not whole yet: a hidden file beside its target, which becomes the target in one step.

`.NAME.part` holds the bytes so far, `.NAME.part.json` what they were taken from. No other name ever holds a byte of an
unfinished or unchecked file.
"""

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_CHUNK = 1 << 20


class PartialError(OSError):
    """A partial file that cannot be worked on; the message says why."""


class Partial:
    """The bytes of `target` that have arrived, locked against other processes. A context manager.

    Leaving it keeps what is there, so that a later attempt goes on; `publish` and `discard` end it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self._facts = target.with_name(f".{target.name}.part.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        self.origin: dict[str, Any] = self._read_facts()
        """What the bytes were taken from, as `begin` was told; empty where nothing can be gone on with."""
        self._hash = hashlib.sha256()
        self.size = 0
        if self.origin:
            while chunk := self._file.read(_CHUNK):
                self._hash.update(chunk)
                self.size += len(chunk)
        else:
            self.restart()
        self.resumed = self.size
        """Bytes of an earlier process that still count."""

    def __enter__(self) -> "Partial":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        if self.size:
            self._file.close()
        else:
            self.discard()

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._hash.hexdigest()

    def begin(self, origin: dict[str, Any]) -> None:
        """Note what the bytes from here on are taken from, before the first of them arrives."""
        if origin != self.origin:
            draft = self._facts.with_suffix(".draft")
            draft.write_text(json.dumps(origin))
            draft.replace(self._facts)
            self.origin = origin

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Forget every byte."""
        self._file.seek(0)
        self._file.truncate()
        self._facts.unlink(missing_ok=True)
        self._hash, self.size, self.origin, self.resumed = hashlib.sha256(), 0, {}, 0

    def publish(self) -> None:
        """Make the bytes the target, on the disk and all at once."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.path.replace(self.target)
        self._facts.unlink(missing_ok=True)
        self._file.close()

    def discard(self) -> None:
        self.restart()
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _locked(self) -> Any:
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise PartialError(
                    f"{self.target}: another process is downloading it; wait for that one, or end it"
                ) from None
            # Between opening and locking, another process may have finished: then this is the finished file itself.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                    file.seek(0)
                    return file
            file.close()

    def _read_facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self._facts.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}
