"""API keys: who may use a service and how much, in a file that holds their hashes and never a key.

The file is JSON: `{"format": 1, "keys": [Key, …]}`, local (a Kubernetes Secret's mount, say) or at `s3://…`. It is
read again every few seconds, so that keys are made, changed and revoked under a running service.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from speechgpt.runtime import files

KEY_VARIABLE = "SPEECHGPT_API_KEY"
"""One key without limits, where a file is too much."""
KEYS_VARIABLE = "SPEECHGPT_API_KEYS"
"""Address of the file of keys, where the recipe's `serving.keys` names none."""
ENVIRONMENT_ID = "0" * 12
"""Id, in the audit log, of the key in KEY_VARIABLE."""
_PREFIX = "sk"
_READ_SECONDS = 1.0
"""How long requests wait for the file when it is read again."""

logger = logging.getLogger("ray.serve")


class KeysError(RuntimeError):
    """A file of keys that cannot be read or written; the message names it and says what to do."""


class Allowance(BaseModel):
    """What a key may use, over all replicas of the gateway together; None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    requests_per_minute: int | None = Field(None, ge=1)
    """That many at once, too; they come back evenly over the minute."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Requests and Realtime sessions under way at a time."""
    audio_seconds_per_day: float | None = Field(None, gt=0)
    """Seconds of sound sent to be heard. Days begin at midnight UTC."""
    tokens_per_day: int | None = Field(None, ge=1)
    """Tokens of prompts and answers, as `usage.total_tokens` counts them."""

    @property
    def unlimited(self) -> bool:
        return all(value is None for value in self.model_dump().values())


class Key(BaseModel):
    """What is kept of a key. Times are Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the whole key. Keys are 256 random bits: nothing slower than one round of a hash would protect them better."""
    created: int
    expires: int | None = None
    revoked: int | None = None
    allowance: Allowance = Allowance()

    def valid(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _ids_differ(self) -> "KeyFile":
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("an id stands there twice")
        return self


def hash_key(key: str) -> str:
    """The only form in which an API key leaves the process that was given it."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str, allowance: Allowance, now: float, expires_seconds: float | None = None) -> tuple[str, Key]:
    """A key, to be shown once, and what is kept of it."""
    id = secrets.token_hex(6)
    token = f"{_PREFIX}-{id}-{secrets.token_urlsafe(32)}"
    expires = None if expires_seconds is None else int(now + expires_seconds)
    return token, Key(id=id, name=name, sha256=hash_key(token), created=int(now), expires=expires, allowance=allowance)


def read(address: str) -> KeyFile:
    """The keys at `address`, a local path or `s3://…`. Raises KeysError."""
    try:
        return KeyFile.model_validate_json(files.read_bytes(address))
    except FileNotFoundError:
        raise KeysError(f"keys {address}: there is no such file; `speechgpt keys add NAME` makes one") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise KeysError(f"keys {address}: {where or 'the file'}: {first['msg']}") from None
    except OSError as error:
        raise KeysError(f"keys {address} cannot be read: {error}") from None


def change(address: str, edit: Callable[[KeyFile], KeyFile]) -> KeyFile:
    """Read the keys (none if there is no such file), `edit` them, and put the result in their place.

    A reader sees the old file or the new. Local writers wait for each other; on S3 the last one wins. A new local
    file can be read by its owner only. Raises KeysError.
    """
    with _alone(address):
        try:
            found = read(address) if _exists(address) else KeyFile()
            changed = edit(found)
            _replace(address, changed.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")
        except OSError as error:
            raise KeysError(f"keys {address} cannot be written: {error}") from None
    return changed


class KeyRing:
    """The keys that open a service, as they are now.

    address: of the file, or "". environment_hash: `hash_key` of a key without limits that the environment gave. A file
    that cannot be read later leaves the keys as they were and says so in the log; revoking must reach the file.
    """

    def __init__(
        self,
        address: str,
        environment_hash: str | None,
        refresh_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises KeysError when the file cannot be read."""
        self._address = address
        self._environment_hash = environment_hash
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._read_at = clock()
        self._keys = self._read() if address else {}
        self._reading: asyncio.Task[None] | None = None
        self._wait_until = 0.0

    async def find(self, token: str) -> Key | None:
        """The valid key that `token` is, or None."""
        now = self._clock()
        if self._address and now - self._read_at >= self._refresh_seconds:
            await self._refreshed(now)
        digest = hash_key(token)
        if self._environment_hash and hmac.compare_digest(digest, self._environment_hash):
            return Key(id=ENVIRONMENT_ID, name=KEY_VARIABLE, sha256=digest, created=0)
        known = self._keys.get(_id_of(token))
        # The same work whether or not the id is known.
        same = hmac.compare_digest(digest, known.sha256 if known else "0" * 64)
        return known if known and same and known.valid(now) else None

    async def _refreshed(self, now: float) -> None:
        """The file is read once for all who come meanwhile. Who comes to a store that does not answer goes on with
        what is known."""
        clock = asyncio.get_running_loop().time
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_again(now))
            self._wait_until = clock() + _READ_SECONDS
        await asyncio.wait({self._reading}, timeout=max(0.0, self._wait_until - clock()))

    async def _read_again(self, now: float) -> None:
        try:
            self._keys = await asyncio.to_thread(self._read)
        except KeysError as error:
            logger.error("%s; the keys of before hold on", error)
        self._read_at = now

    def _read(self) -> dict[str, Key]:
        return {key.id: key for key in read(self._address).keys}


def _id_of(token: str) -> str:
    prefix, _, rest = token.partition("-")
    return rest.partition("-")[0] if prefix == _PREFIX else ""


def _exists(address: str) -> bool:
    if address.startswith("s3://"):
        from speechgpt.runtime import buckets

        return buckets.exists(address.removeprefix("s3://"))
    return Path(address).exists()


def _replace(address: str, content: bytes) -> None:
    if address.startswith("s3://"):
        from speechgpt.runtime.workspace import Workspace

        prefix, _, name = address.rpartition("/")
        Workspace(prefix).write_bytes(name, content)
        return
    target = Path(address)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
    descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, mode)
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(address: str) -> Iterator[None]:
    if address.startswith("s3://"):
        yield
        return
    folder = Path(address).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise KeysError(f"keys {address} cannot be written: {error}") from None
    try:
        # The directory: the file itself is replaced.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
