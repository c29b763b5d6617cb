"""What an AWS account needs before `ray up`: the workspace's bucket, and the roles of head and nodes.

`plan` says it as plain data, `apply` makes it so. Rights are the least that works: nodes read and write one bucket;
the head also starts machines, but only with the node's role, and ends only those that carry Ray's cluster tag.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from speechgpt.runtime.aws_cluster import HEAD_PROFILE, NODE_PROFILE

Document = dict[str, Any]
ABANDONED_UPLOAD_DAYS = 7
"""Parts of an upload that was cut off are kept, and paid for, until then."""
OLD_VERSION_DAYS = 30
"""How long an overwritten or deleted object can be brought back."""

_MACHINE_PARTS = ("volume", "network-interface", "subnet", "security-group", "key-pair", "spot-instances-request")


class AccountError(RuntimeError):
    """The account refused, or holds something of that name that is not ours; the message says what to do."""


@dataclass(frozen=True)
class Plan:
    """All that is made, and nothing else is touched."""

    bucket: str
    region: str
    roles: dict[str, Document] = field(default_factory=dict)
    """Role, and instance profile of the same name: its one policy."""
    bucket_policy: Document = field(default_factory=dict)
    lifecycle: Document = field(default_factory=dict)

    def document(self) -> Document:
        return {
            "bucket": {
                "name": self.bucket,
                "region": self.region,
                "encryption": "AES256",
                "versioning": "Enabled",
                "public_access": "blocked",
                "policy": self.bucket_policy,
                "lifecycle": self.lifecycle,
            },
            "trust": TRUST,
            "roles": self.roles,
        }


TRUST: Document = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def plan(bucket: str, region: str, account: str) -> Plan:
    """`account` is the 12-digit number; rights name things of this account only."""
    storage = _storage_rights(bucket)
    return Plan(
        bucket,
        region,
        roles={
            NODE_PROFILE: _policy(*storage),
            HEAD_PROFILE: _policy(*storage, *_autoscaler_rights(region, account)),
        },
        bucket_policy=_policy(
            {
                "Sid": "OnlyEncryptedConnections",
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:*",
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
                "Condition": {"Bool": {"aws:SecureTransport": "false"}},
            }
        ),
        lifecycle={
            "Rules": [
                {
                    "ID": "abandoned-uploads",
                    "Status": "Enabled",
                    "Filter": {"Prefix": ""},
                    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABANDONED_UPLOAD_DAYS},
                },
                {
                    "ID": "old-versions",
                    "Status": "Enabled",
                    "Filter": {"Prefix": ""},
                    "NoncurrentVersionExpiration": {"NoncurrentDays": OLD_VERSION_DAYS},
                    "Expiration": {"ExpiredObjectDeleteMarker": True},
                },
            ]
        },
    )


def account_of(session: Any) -> str:
    """The number of the account whose credentials `session` (boto3) holds. Raises AccountError."""
    with _explained("find out the account"):
        return str(session.client("sts").get_caller_identity()["Account"])


def apply(wanted: Plan, session: Any) -> Iterator[str]:
    """Make it so, telling each step; run again, it changes only what differs. Raises AccountError.

    `session` is a boto3 session whose credentials may administer IAM and S3.
    """
    yield from _bucket(wanted, session.client("s3", region_name=wanted.region))
    iam = session.client("iam")
    for name, policy in wanted.roles.items():
        yield from _role(iam, name, policy)


def _bucket(wanted: Plan, s3: Any) -> Iterator[str]:
    from botocore.exceptions import ClientError

    is_there = True
    with _explained(f"look at bucket {wanted.bucket}"):
        try:
            s3.head_bucket(Bucket=wanted.bucket)
        except ClientError as error:
            # A HEAD request has no other answer than its status.
            code = error.response["Error"]["Code"]
            if code == "403":
                raise AccountError(
                    f"bucket {wanted.bucket} is another account's (names are the whole world's), or these credentials "
                    "may not see it: take another name, or credentials that administer S3"
                ) from None
            if code not in ("404", "NoSuchBucket"):
                raise
            is_there = False
    if is_there:
        yield f"bucket {wanted.bucket} is there"
    else:
        place = {} if wanted.region == "us-east-1" else {"LocationConstraint": wanted.region}
        with _explained(f"make bucket {wanted.bucket}"):
            s3.create_bucket(Bucket=wanted.bucket, **({"CreateBucketConfiguration": place} if place else {}))
        yield f"bucket {wanted.bucket} made in {wanted.region}"
    name = {"Bucket": wanted.bucket}
    with _explained(f"set up bucket {wanted.bucket}"):
        blocked = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
        s3.put_public_access_block(**name, PublicAccessBlockConfiguration=dict.fromkeys(blocked, True))
        encryption = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
        s3.put_bucket_encryption(**name, ServerSideEncryptionConfiguration=encryption)
        s3.put_bucket_versioning(**name, VersioningConfiguration={"Status": "Enabled"})
        s3.put_bucket_policy(**name, Policy=json.dumps(wanted.bucket_policy))
        s3.put_bucket_lifecycle_configuration(**name, LifecycleConfiguration=wanted.lifecycle)
    yield f"bucket {wanted.bucket}: private, encrypted, versioned, old versions end after {OLD_VERSION_DAYS} days"


def _role(iam: Any, name: str, policy: Document) -> Iterator[str]:
    with _explained(f"make role {name}"):
        try:
            trust = iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
            if trust != TRUST:
                raise AccountError(f"role {name} is there and trusts others than EC2: look at it, then delete it")
        except iam.exceptions.NoSuchEntityException:
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(TRUST))
            yield f"role {name} made"
        iam.put_role_policy(RoleName=name, PolicyName="speechgpt", PolicyDocument=json.dumps(policy))
        try:
            profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        except iam.exceptions.NoSuchEntityException:
            profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        if name not in [role["RoleName"] for role in profile["Roles"]]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield f"role {name}: its policy is as planned"


def _storage_rights(bucket: str) -> list[Document]:
    return [
        {
            "Sid": "FindInTheWorkspace",
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
            "Resource": f"arn:aws:s3:::{bucket}",
        },
        {
            "Sid": "ReadAndWriteTheWorkspace",
            "Effect": "Allow",
            "Action": [
                "s3:GetObject",
                "s3:PutObject",
                "s3:DeleteObject",
                "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
            ],
            "Resource": f"arn:aws:s3:::{bucket}/*",
        },
    ]


def _autoscaler_rights(region: str, account: str) -> list[Document]:
    """What Ray's AWS node provider calls on the head."""
    ours = {"StringLike": {"ec2:ResourceTag/ray-cluster-name": "speechgpt-*"}}
    here = f"arn:aws:ec2:{region}:{account}"
    return [
        {
            "Sid": "See",
            "Effect": "Allow",
            # AWS knows no narrower resource for these.
            "Action": ["ec2:Describe*"],
            "Resource": "*",
        },
        {
            "Sid": "StartMachinesOfOurClusters",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": f"{here}:instance/*",
            "Condition": {"StringLike": {"aws:RequestTag/ray-cluster-name": "speechgpt-*"}},
        },
        {
            "Sid": "WithWhatAMachineIsMadeOf",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [*(f"{here}:{kind}/*" for kind in _MACHINE_PARTS), f"arn:aws:ec2:{region}::image/*"],
        },
        {
            "Sid": "TagWhatIsStarted",
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": f"{here}:*/*",
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Sid": "TagAndEndMachinesOfOurClusters",
            "Effect": "Allow",
            "Action": ["ec2:CreateTags", "ec2:DeleteTags", "ec2:TerminateInstances"],
            "Resource": f"{here}:instance/*",
            "Condition": ours,
        },
        {
            "Sid": "GiveNodesTheirRoleAndNoOther",
            "Effect": "Allow",
            "Action": "iam:PassRole",
            "Resource": f"arn:aws:iam::{account}:role/{NODE_PROFILE}",
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
    ]


def _policy(*statements: Document) -> Document:
    return {"Version": "2012-10-17", "Statement": list(statements)}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """AWS's refusals as AccountError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] in ("AccessDenied", "UnauthorizedOperation"):
            raise AccountError(
                f"cannot {what}: these credentials may not {error.operation_name}; use ones that administer "
                "IAM and S3, or give the output of --dry-run to somebody who has them"
            ) from None
        raise AccountError(f"cannot {what}: {error}") from None
    except BotoCoreError as error:
        raise AccountError(f"cannot {what}: {error}") from None
