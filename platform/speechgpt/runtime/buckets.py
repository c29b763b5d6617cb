"""S3 under a workspace: boto3 lists and deletes, pyarrow moves the bytes.

Addresses are `bucket/key`, as pyarrow writes them. Endpoint, region and credentials come from the environment and the
machine's role, as for every AWS client (`AWS_ENDPOINT_URL` for another S3 server).
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from speechgpt.runtime import uploads
from speechgpt.runtime.patience import patiently


class BucketError(OSError):
    """S3 refused or did not answer; the message names the bucket and the server's reason."""


_STREAMS = 8
_ATTEMPTS = 8
"""Of a request that fails for a passing reason. Three, the libraries' own, lose one in a million at 1 % of failures."""
_DELETE_LIMIT = 1000
"""Keys that one DeleteObjects request may name."""


@lru_cache
def filesystem(uri: str) -> pafs.FileSystem:
    """The pyarrow file system of an s3:// URI, in the region of its bucket."""
    try:
        region = pafs.FileSystem.from_uri(uri)[0].region
        # What from_uri would take from the environment, too; it has no way to say how often to ask.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return pafs.S3FileSystem(
            region=region,
            endpoint_override=endpoint,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        )
    except OSError as error:
        raise BucketError(f"{uri}: {error}") from None


@lru_cache
def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": _ATTEMPTS}))


def keys(address: str) -> Iterator[str]:
    """`bucket/key` of the object of that name and of those below it; directory markers are no objects."""
    return (name for name, _, _ in facts(address))


def facts(address: str) -> Iterator[tuple[str, int, int]]:
    """Of each of the objects that `keys` gives: its address, size in bytes, and nanoseconds since the epoch."""
    bucket, _, prefix = address.partition("/")
    for page in _pages(bucket, prefix):
        for entry in page.get("Contents", []):
            key = entry["Key"]
            if not key.endswith("/") and (not prefix or key == prefix or key.startswith(f"{prefix}/")):
                yield f"{bucket}/{key}", entry["Size"], int(entry["LastModified"].timestamp() * 1e9)


def _pages(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield from _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    except (BotoCoreError, ClientError) as error:
        raise BucketError(f"s3://{bucket}/{prefix}: {error}") from None


def exists(address: str) -> bool:
    return next(keys(address), None) is not None


def delete(address: str) -> None:
    """The object of that name and those below it."""
    _delete(list(keys(address)))


def download(fs: pafs.FileSystem, address: str, target: Path) -> None:
    """An object becomes the file `target`; a prefix becomes a directory."""
    found = list(keys(address))
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(lambda key: _get(fs, key, target / key[len(address) + 1 :] if key != address else target), found))


def replace(fs: pafs.FileSystem, folder: Path, address: str) -> None:
    """Upload a directory, files of its top level last, then delete what stood there and is not in it."""
    stale = set(keys(address))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for deep in (True, False):
        wave = [file for file in files if (file.parent != folder) == deep]
        with ThreadPoolExecutor(_STREAMS) as pool:
            stale -= set(
                pool.map(lambda file: _put(fs, file, f"{address}/{file.relative_to(folder).as_posix()}"), wave)
            )
    _delete(sorted(stale))


def _get(fs: pafs.FileSystem, address: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    local = pafs.LocalFileSystem()
    patiently(lambda: pafs.copy_files(address, str(target), source_filesystem=fs, destination_filesystem=local))


def _put(fs: pafs.FileSystem, file: Path, address: str) -> str:
    uploads.put(file, fs, address)
    return address


def _delete(addresses: list[str]) -> None:
    for start in range(0, len(addresses), _DELETE_LIMIT):
        batch = addresses[start : start + _DELETE_LIMIT]
        bucket = batch[0].partition("/")[0]
        objects = [{"Key": address.partition("/")[2]} for address in batch]
        answer = _client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        if errors := answer.get("Errors"):
            raise BucketError(f"s3://{bucket}/{errors[0]['Key']} was not deleted: {errors[0]['Message']}")
