"""Everything in a set of buckets as files in a directory, and back."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote


def save(s3: Any, buckets: Iterable[str], directory: Path) -> int:
    """Copy each object to DIRECTORY/BUCKET/KEY, in place of what is there; returns how many.

    `s3` is a boto3 S3 client. A key is one file name, percent-encoded: keys may hold `..` and end in a slash.
    """
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    count = 0
    for bucket in buckets:
        (fresh / bucket).mkdir(parents=True)
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", []):
                s3.download_file(bucket, item["Key"], str(fresh / bucket / quote(item["Key"], safe="")))
                count += 1
    # Only a whole copy takes the place of the last one.
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)
    return count


def load(s3: Any, directory: Path) -> int:
    """Put what `save` wrote back, removing what else the buckets hold; returns how many objects."""
    from botocore.exceptions import ClientError

    count = 0
    for place in sorted(directory.iterdir()):
        try:
            s3.create_bucket(Bucket=place.name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        wanted = {unquote(file.name): file for file in place.iterdir()}
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=place.name):
            for item in page.get("Contents", []):
                if item["Key"] not in wanted:
                    s3.delete_object(Bucket=place.name, Key=item["Key"])
        for key, file in wanted.items():
            s3.upload_file(str(file), place.name, key)
            count += 1
    return count
