"""Whether a workspace's bucket can be used from here: reached, found, read, written, with a clock that S3 accepts."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from speechgpt.runtime.cluster_health import judge_clock
from speechgpt.runtime.findings import Finding

_REMEDIES = {
    "NoSuchBucket": "name another bucket, or make it: speechgpt cluster account --bucket {bucket}",
    "AccessDenied": "these credentials may not: the role's policy must allow it (speechgpt cluster account --dry-run), "
    "or another profile or role is needed (AWS_PROFILE), if it is another account's",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is unknown there: another key, or unset it to use the machine's role",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to the key's id",
    "ExpiredToken": "log in again, or renew AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "set this machine's clock (timedatectl set-ntp true)",
    "PermanentRedirect": "the bucket is in another region: AWS_DEFAULT_REGION",
}


def examine_bucket(workspace: str) -> Iterator[Finding]:
    """Of `s3://bucket/prefix`. Writes, reads and deletes one small object under the prefix."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = workspace.removeprefix("s3://").partition("/")
    quick = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
    key = "/".join(filter(None, (prefix.rstrip("/"), f".doctor-{uuid.uuid4().hex}")))
    step = "list"
    try:
        s3 = boto3.client("s3", config=quick)
        # Not `head_bucket`: an answer without a body says 403, and not why.
        reply = s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        step = "write"
        s3.put_object(Bucket=bucket, Key=key, Body=b"speechgpt doctor")
        step = "read"
        s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        step = "delete"
        s3.delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        yield _failed(bucket, step, error.response["Error"]["Code"], str(error))
        return
    except BotoCoreError as error:
        remedy = "AWS_ENDPOINT_URL or the network, if it cannot be reached; AWS credentials, if there are none"
        yield Finding("workspace", "missing", f"s3://{bucket}: cannot {step}: {error}", remedy)
        return
    yield Finding("workspace", "ok", f"s3://{bucket} can be read and written")
    yield judge_clock("S3's clock", _date(reply), datetime.now(UTC))


def _failed(bucket: str, step: str, code: str, message: str) -> Finding:
    remedy = _REMEDIES.get(code, "AWS credentials (environment, profile or role) that may read and write it")
    return Finding("workspace", "missing", f"s3://{bucket}: cannot {step}: {message}", remedy.format(bucket=bucket))


def _date(reply: dict[str, Any]) -> str:
    return str(reply["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
