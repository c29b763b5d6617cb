"""`doctor` on clusters and buckets that are broken, each in one way."""

import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from speechgpt.runtime import doctor
from speechgpt.runtime.bucket_health import examine_bucket
from speechgpt.runtime.cluster_health import (
    examine_cluster,
    judge_clock,
    judge_nodes,
    judge_openness,
    judge_token,
    judge_version,
)

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def node(**changes: Any) -> dict[str, Any]:
    """As the dashboard's summary has it; only what is looked at."""
    raylet = {
        "state": "ALIVE",
        "objectStoreUsedMemory": 1 << 20,
        "objectStoreAvailableMemory": 1 << 30,
        "resourcesTotal": {"CPU": 8.0},
    }
    return {
        "ip": "10.0.0.7",
        "gpus": [],
        "disk": {"/tmp": {"free": 50 << 30, "total": 100 << 30}},
        "raylet": raylet | changes.pop("raylet", {}),
    } | changes


@pytest.mark.parametrize(
    ("broken", "subject", "grade", "says"),
    [
        (node(raylet={"objectStoreUsedMemory": 19 << 30}), "object store of 10.0.0.7", "note", "95% of 20.0 GiB"),
        (node(disk={"/tmp": {"free": 1 << 30, "total": 100 << 30}}), "disk of 10.0.0.7", "missing", "1.0 GiB free"),
        (node(raylet={"resourcesTotal": {"GPU": 4.0}}), "GPU of 10.0.0.7", "missing", "4 claimed, none seen"),
        (
            node(raylet={"state": "DEAD", "stateMessage": "Unexpected termination: killed"}),
            "node 10.0.0.7",
            "note",
            "Unexpected termination",
        ),
    ],
)
def test_a_broken_node_is_named_with_what_to_do(broken: dict[str, Any], subject: str, grade: str, says: str) -> None:
    assert [finding.grade for finding in judge_nodes([node()])] == ["ok"]
    [first, finding] = judge_nodes([node(), broken])
    assert (finding.subject, finding.grade) == (subject, grade)
    assert says in finding.found
    assert finding.remedy


def test_nodes_that_the_autoscaler_took_are_no_trouble() -> None:
    taken = node(raylet={"state": "DEAD", "stateMessage": "EXPECTED_TERMINATION: idle"})
    assert [finding.subject for finding in judge_nodes([node(), taken])] == ["nodes"]
    assert [finding.grade for finding in judge_nodes([taken])] == ["missing"]


@pytest.mark.parametrize(("seconds", "grade"), [(0, "ok"), (-50, "ok"), (90, "note"), (-90, "note"), (1000, "missing")])
def test_clocks_that_differ(seconds: int, grade: str) -> None:
    date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    finding = judge_clock("S3's clock", date, NOW)
    assert finding.grade == grade
    assert ("NTP" in finding.remedy) == (grade != "ok")
    assert judge_clock("S3's clock", "yesterday", NOW).grade == "note"


def test_versions_and_openness() -> None:
    assert judge_version("2.60.0", "2.60.0").grade == "ok"
    other = judge_version("2.59.0", "2.60.0")
    assert (other.grade, "2.59.0 on the cluster" in other.found, "ray==2.59.0" in other.remedy) == (
        "missing",
        True,
        True,
    )
    assert judge_openness("http://head:8265", answers_strangers=True).grade == "missing"
    assert judge_openness("http://head:8265", answers_strangers=False).grade == "ok"


def test_a_token_that_is_not_there_or_everyones(tmp_path: Path) -> None:
    file = tmp_path / "auth_token"
    assert "ray get-auth-token" in judge_token("", str(file)).remedy
    file.write_text("secret")
    file.chmod(0o644)
    open_to_all = judge_token("secret", str(file))
    assert (open_to_all.grade, open_to_all.remedy) == ("note", f"chmod 600 {file}")
    file.chmod(0o600)
    assert judge_token("secret", str(file)).grade == "ok"


def test_a_cluster_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finding = list(examine_cluster(f"http://127.0.0.1:{port}"))[-1]
    assert (finding.subject, finding.grade) == ("Ray cluster", "missing")
    assert "is the cluster up" in finding.remedy


@pytest.mark.ray
def test_a_real_cluster_with_its_token_with_another_and_with_none(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    address = ray.worker.global_worker.node.webui_url
    assert address
    findings = {finding.subject: finding for finding in examine_cluster(address)}
    assert {subject for subject, finding in findings.items() if finding.grade == "missing"} == set(), findings
    assert findings["nodes"].found == "1 alive"
    assert findings["Ray authentication"].found == "who has no token is refused"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    *_, refused = examine_cluster(address)
    assert (refused.subject, refused.grade) == ("Ray token", "missing")
    assert "refuses the token from RAY_AUTH_TOKEN" in refused.found
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    *_, asked = examine_cluster(address)
    assert "wants a token" in asked.found


def test_a_bucket_that_can_be_used(s3_bucket: str) -> None:
    findings = list(examine_bucket(f"s3://{s3_bucket}/run"))
    assert [(finding.subject, finding.grade) for finding in findings] == [("workspace", "ok"), ("S3's clock", "ok")]
    import boto3

    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3_bucket), "the doctor leaves nothing"


def test_a_bucket_that_is_not_there(s3_server: str) -> None:
    [finding] = examine_bucket("s3://no-such-bucket-here/run")
    assert finding.grade == "missing"
    assert "speechgpt cluster account --bucket no-such-bucket-here" in finding.remedy


READ_ONLY = {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}


@pytest.fixture
def keys(s3_bucket: str, s3_server: str) -> Iterator[Callable[..., dict[str, str]]]:
    """Makes keys that may do what their policy says, and has the server look at them while the test runs."""
    import boto3

    iam = boto3.client("iam")

    def make(*policy: dict[str, Any]) -> dict[str, str]:
        user = f"user-{uuid.uuid4().hex[:8]}"
        iam.create_user(UserName=user)
        document = json.dumps({"Version": "2012-10-17", "Statement": policy or (NOTHING,)})
        iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=document)
        made = iam.create_access_key(UserName=user)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}

    yield make
    looks_at_keys(s3_server, False)


def looks_at_keys(server: str, does: bool) -> None:
    body = b"0" if does else b"1000000000"
    httpx.post(f"{server}/moto-api/reset-auth", content=body, headers={"content-type": "application/octet-stream"})


NOTHING = {"Effect": "Deny", "Action": "s3:*", "Resource": "*"}


@pytest.mark.parametrize(
    ("wrong", "step", "remedy"),
    [
        ("unknown key", "list", "AWS_ACCESS_KEY_ID is unknown there"),
        ("wrong secret", "list", "AWS_SECRET_ACCESS_KEY does not belong"),
        ("no right", "list", "the role's policy must allow it"),
        ("read only", "write", "the role's policy must allow it"),
        ("no such bucket", "list", "speechgpt cluster account --bucket no-such-bucket"),
    ],
)
def test_keys_that_are_refused(keys, s3_bucket, s3_server, monkeypatch, wrong, step, remedy) -> None:
    given = keys(*{"read only": [READ_ONLY], "no right": []}.get(wrong, [{**READ_ONLY, "Action": "s3:*"}]))
    if wrong == "unknown key":
        given["AWS_ACCESS_KEY_ID"] = "AKIAIOSFODNN7EXAMPLE"
    if wrong == "wrong secret":
        given["AWS_SECRET_ACCESS_KEY"] = "x" * 40
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    # It keeps the keys that it found first.
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    looks_at_keys(s3_server, True)
    [finding] = examine_bucket(f"s3://{'no-such-bucket' if wrong == 'no such bucket' else s3_bucket}/run")
    assert finding.grade == "missing" and f"cannot {step}: " in finding.found
    assert remedy in finding.remedy


def test_an_s3_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    [finding] = examine_bucket("s3://bucket/run")
    assert (finding.grade, "AWS_ENDPOINT_URL" in finding.remedy) == ("missing", True)


def test_the_command_names_an_unreachable_cluster_and_ends_with_1(tmp_path: Path) -> None:
    words = ["doctor", "--workspace", str(tmp_path), "--address", "http://127.0.0.1:9", "--json"]
    done = subprocess.run([sys.executable, "-m", "speechgpt.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert told["Ray cluster"]["found"]
    assert {"shared memory", "open files", "workspace"} <= set(told)


def test_a_small_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY", 1 << 60)
    finding = doctor._shared_memory()
    assert finding is not None
    assert (finding.grade, "--shm-size" in finding.remedy) == ("note", True)


def test_tracking_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    finding = doctor._tracking()
    assert (finding.grade, "does not answer" in finding.found) == ("missing", True)
    assert "secret" not in finding.found + finding.remedy


def test_a_gpu_whose_driver_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver's own tool is there, and no GPU that torch sees."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor._gpu()
    assert (finding.grade, "CUDA build" in finding.remedy) == ("note", True)
