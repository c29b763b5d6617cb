"""Checkpoints of a stage on storage that fails: uploads are repeated or refused with the reason, never half taken."""

import json
import logging
import re
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faulty_store import faulty

from jobs import stage_checkpoints
from speechgpt.runtime import buckets, patience
from speechgpt.runtime.workspace import Workspace

RUN = "checkpoints/base/run"


def part(directory: Path, rank: int = 0, world: int = 1, step: int = 3) -> Path:
    (directory / "engine").mkdir(parents=True, exist_ok=True)
    (directory / "engine" / f"shard-{rank}.pt").write_bytes(bytes([rank]) * 20_000)
    listed = {"step": step, "world": world, "files": {f"engine/shard-{rank}.pt": "…"}, "read": {}}
    (directory / f"part-{rank}.json").write_text(json.dumps(listed))
    return directory


def through(endpoint: str) -> pafs.S3FileSystem:
    # No repetition by the client itself: what is tested is ours.
    return pafs.S3FileSystem(
        access_key="testing",
        secret_key="testing",
        region="us-east-1",
        endpoint_override=endpoint,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES", (0.01,) * 5)


def uploaded(bucket: str) -> list[str]:
    return Workspace(f"s3://{bucket}").list()


def test_errors_and_slowness_are_sat_out(s3_server, s3_bucket, tmp_path, caplog):
    refused: dict[str, int] = {}

    def fault(method: str, path: str) -> tuple[int, str] | float | None:
        # Each attempt has an upload id of its own.
        request = re.sub("uploadId=[^&]*", "", path)
        if method in ("PUT", "POST") and refused.setdefault(request, 0) < 1:
            refused[request] += 1
            return 500, "InternalError"
        return 0.1

    with caplog.at_level(logging.WARNING), faulty(s3_server, fault) as endpoint:
        stage_checkpoints.upload(part(tmp_path), through(endpoint), f"{s3_bucket}/{RUN}/checkpoint_1")
    assert any("partNumber" in request for request in refused), "pyarrow itself says nothing when a part is refused"
    assert "again in" in caplog.text
    assert uploaded(s3_bucket) == [f"{RUN}/checkpoint_1/engine/shard-0.pt", f"{RUN}/checkpoint_1/part-0.json"]
    assert stage_checkpoints._found(Workspace(f"s3://{s3_bucket}"), RUN) == (["checkpoint_1"], [])


def test_a_refused_upload_is_named_and_leaves_nothing_that_looks_whole(s3_server, s3_bucket, tmp_path, caplog):
    def fault(method: str, path: str) -> tuple[int, str] | None:
        return (403, "AccessDenied") if method in ("PUT", "POST") and "shard-0" in path else None

    with (
        faulty(s3_server, fault) as endpoint,
        pytest.raises(OSError, match=r"shard-0.pt was not taken.*ACCESS_DENIED"),
    ):
        stage_checkpoints.upload(part(tmp_path), through(endpoint), f"{s3_bucket}/{RUN}/checkpoint_1")
    assert caplog.text.count("again in") == 5
    assert not [name for name in uploaded(s3_bucket) if name.endswith("part-0.json")], "the list goes last"
    assert stage_checkpoints._found(Workspace(f"s3://{s3_bucket}"), RUN)[0] == []


def test_only_checkpoints_with_the_parts_of_all_ranks_count_and_the_newest_come_first(tmp_path):
    workspace = Workspace(tmp_path)
    for name, step, ranks in (("b", 3, (0, 1)), ("a", 6, (0, 1)), ("c", 9, (0,)), ("d", 12, (1,))):
        for rank in ranks:
            part(tmp_path / RUN / f"checkpoint_{name}", rank, world=2, step=step)
    part(tmp_path / RUN / "checkpoint_e", step=15)
    (tmp_path / RUN / "checkpoint_e" / "part-0.json").write_text('{"step": 15, "wor')
    whole, unfinished = stage_checkpoints._found(workspace, RUN)
    assert whole == ["checkpoint_a", "checkpoint_b"]
    assert unfinished == ["checkpoint_c", "checkpoint_d", "checkpoint_e"]


def test_tidying_keeps_the_newest_whole_ones_even_if_the_index_is_cut_off(tmp_path):
    workspace, said = Workspace(tmp_path), []
    for name, step in (("a", 3), ("b", 6), ("c", 9)):
        part(tmp_path / RUN / f"checkpoint_{name}", step=step)
    part(tmp_path / RUN / "checkpoint_d", world=2, step=12)
    workspace.write_bytes(f"{RUN}/checkpoint_manager_snapshot.json", b'{"checkpoint_re')
    workspace.write_bytes("checkpoints/base/start/model.safetensors", b"kept")
    stage_checkpoints.tidy(workspace, RUN, keep=2, say=said.append)
    left = {Path(name).parts[3] for name in workspace.list(RUN)}
    assert left == {"checkpoint_b", "checkpoint_c"}
    assert said == [f"{RUN}/checkpoint_d is not whole and is removed"]
    assert workspace.exists("checkpoints/base/start/model.safetensors")


def test_a_refused_directory_is_an_error_and_not_a_gap(s3_server, s3_bucket, tmp_path):
    def fault(method: str, path: str) -> tuple[int, str] | None:
        return (500, "InternalError") if "partNumber" in path or method == "PUT" else None

    with faulty(s3_server, fault) as endpoint, pytest.raises(OSError, match="shard-0.pt was not taken"):
        buckets.replace(through(endpoint), part(tmp_path), f"{s3_bucket}/models/base")
    assert uploaded(s3_bucket) == []
