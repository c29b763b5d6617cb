"""Ray's cluster launcher, as `speechgpt cluster up|down|status` uses it.

`ray up` asks questions of its own, starts nothing without a token, and tells its machines apart by tags; here that is
checked first, and the tags are read back.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

_LIVING = ("pending", "running", "stopping", "stopped")


class RayUpError(RuntimeError):
    """The cloud did not answer, or refused; the message says what to do."""


def name(file: Path) -> str:
    return str(yaml.safe_load(file.read_text())["cluster_name"])


def up(file: Path) -> int:
    """Exit code of `ray up`; 1 and a message where something it needs is missing."""
    missing = lacking(file)
    for problem in missing:
        typer.echo(f"error: {problem}", err=True)
    return 1 if missing else _ray("up", str(file), "--yes")


def down(file: Path, yes: bool) -> int:
    return _ray("down", str(file), *(["--yes"] if yes else []))


def lacking(file: Path) -> list[str]:
    """What the machine that runs `ray up` must have and has not: each file the nodes are to get."""
    told = {
        "auth_token": "make the cluster's token: ray get-auth-token --generate",
        "environment": "write SPEECHGPT_API_KEY=… (and MLFLOW_TRACKING_URI=…) into it, then chmod 600",
    }
    problems = []
    for mount in yaml.safe_load(file.read_text())["file_mounts"].values():
        place = Path(mount).expanduser()
        remedy = told.get(place.name, "the cluster's file_mounts name it")
        if not place.is_file() or not place.read_text().strip():
            problems.append(f"{place} is missing: {remedy}")
        elif place.name in told and place.stat().st_mode & 0o077:
            problems.append(f"{place} can be read by other users of this machine: chmod 600 {place}")
    return problems


def nodes(file: Path) -> list[dict[str, Any]]:
    """`instance, type, pool, market, state, address` of every machine that is not terminated. Raises RayUpError."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    config = yaml.safe_load(file.read_text())
    filters = [
        {"Name": "tag:ray-cluster-name", "Values": [config["cluster_name"]]},
        {"Name": "instance-state-name", "Values": list(_LIVING)},
    ]
    try:
        pages = (
            boto3.client("ec2", region_name=config["provider"]["region"])
            .get_paginator("describe_instances")
            .paginate(Filters=filters)
        )
        machines = [machine for page in pages for group in page["Reservations"] for machine in group["Instances"]]
    except (BotoCoreError, ClientError) as error:
        raise RayUpError(f"cannot ask AWS for machines in {config['provider']['region']}: {error}") from None
    return sorted((_node(machine) for machine in machines), key=lambda node: (node["pool"] != "head", node["pool"]))


def _node(machine: dict[str, Any]) -> dict[str, Any]:
    tags = {tag["Key"]: tag["Value"] for tag in machine.get("Tags", [])}
    return {
        "instance": machine["InstanceId"],
        "type": machine["InstanceType"],
        "pool": tags.get("ray-user-node-type", ""),
        "market": machine.get("InstanceLifecycle", "on-demand"),
        "state": machine["State"]["Name"],
        "address": machine.get("PublicIpAddress") or machine.get("PrivateIpAddress", ""),
    }


def _ray(*words: str) -> int:
    ray = Path(sys.executable).with_name("ray")
    return subprocess.run([str(ray), *words], env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}, check=False).returncode
