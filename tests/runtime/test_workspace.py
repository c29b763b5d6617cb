"""The same promises hold in a directory and in a bucket of a real S3 server."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_store import faulty

from speechgpt.runtime import buckets, patience
from speechgpt.runtime.buckets import BucketError
from speechgpt.runtime.workspace import Workspace, WorkspaceError


@pytest.fixture(params=["local", "s3"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    if request.param == "local":
        return Workspace(tmp_path / "run")
    return Workspace(f"s3://{request.getfixturevalue('s3_bucket')}/team/run")


def test_files_come_back_as_they_were_written(workspace: Workspace) -> None:
    workspace.write_bytes("units/a.bin", b"\0\1")
    workspace.write_json("units/deep/b.json", {"ü": [1, None]})
    assert workspace.read_bytes("units/a.bin") == b"\0\1"
    assert workspace.read_json("units/deep/b.json") == {"ü": [1, None]}
    assert workspace.list() == workspace.list("units") == ["units/a.bin", "units/deep/b.json"]
    assert workspace.list("units/a.bin") == ["units/a.bin"]


def test_exists_means_this_name_and_no_longer_one(workspace: Workspace) -> None:
    workspace.write_bytes("units-old/a", b"")
    assert workspace.exists("units-old/a")
    assert workspace.exists("units-old")
    assert not workspace.exists("units")
    assert workspace.list("units") == []


def test_missing_names_are_found_with_one_listing_a_directory(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["units", *(f"quarantine/tokenize-{n}.parquet" for n in range(30)), "models/base", "models/chain", "a/b/c"]
    for name in ("units/part-0", *names[1:31:2], "quarantine/tokenize-0.parquet.bak", "models/base/deep/x", "a/b/c"):
        workspace.write_bytes(name, b"x")
    asked: list[str] = []
    keys = buckets.keys
    monkeypatch.setattr(buckets, "keys", lambda address: asked.append(address) or keys(address))
    assert workspace.missing(names) == {*names[2:31:2], "models/chain"}
    assert workspace.missing([]) == set()
    assert len(asked) == (4 if workspace.remote else 0)


def test_delete_takes_a_file_or_a_tree_and_nothing_beside_it(workspace: Workspace) -> None:
    for name in ("units/a", "units/deep/b", "units-old/a", "speech/c"):
        workspace.write_bytes(name, b"x")
    workspace.delete("units")
    workspace.delete("speech/c")
    workspace.delete("never/was")
    assert workspace.list() == ["units-old/a"]


@pytest.mark.parametrize("rel", ["../a", "a/../../b", "/etc/passwd"])
def test_names_stay_inside(workspace: Workspace, rel: str) -> None:
    with pytest.raises(WorkspaceError, match="not a name inside"):
        workspace.read_bytes(rel)


def test_the_whole_workspace_is_never_deleted(workspace: Workspace) -> None:
    workspace.write_bytes("a", b"x")
    with pytest.raises(WorkspaceError, match="whole workspace"):
        workspace.delete("")
    assert workspace.list() == ["a"]


def test_missing_names_are_named(workspace: Workspace) -> None:
    for read in (workspace.read_bytes, workspace.read_json, workspace.digest, workspace.read_table):
        with pytest.raises(WorkspaceError, match="units/none"):
            read("units/none")
    with pytest.raises(WorkspaceError, match="units/none"), workspace.fetch("units/none"):
        pass


def test_tables_of_parts_are_read_in_order_without_markers(workspace: Workspace) -> None:
    workspace.write_table("units/part-1.parquet", pa.table({"id": ["b"]}))
    workspace.write_table("units/part-0.parquet", pa.table({"id": ["a"]}))
    workspace.write_json("units/_done/tokenize.json", {})
    workspace.write_table("units/_done/not-data.parquet", pa.table({"id": ["x"]}))
    assert workspace.read_table("units")["id"].to_pylist() == ["a", "b"]
    assert workspace.read_table("units/part-1.parquet")["id"].to_pylist() == ["b"]


def test_fs_and_root_are_what_arrow_readers_need(workspace: Workspace) -> None:
    workspace.write_table("units/part-0.parquet", pa.table({"n": [1, 2]}))
    assert pq.read_table(workspace.root("units/part-0.parquet"), filesystem=workspace.fs).num_rows == 2


def test_stage_replaces_the_whole_directory(workspace: Workspace) -> None:
    workspace.write_bytes("models/base/old.bin", b"old")
    workspace.write_bytes("models/base-2/other", b"untouched")
    with workspace.stage("models/base") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "new.bin").write_bytes(b"new")
        (folder / "config.json").write_bytes(b"{}")
        assert workspace.list("models/base") == ["models/base/old.bin"]
    assert workspace.list() == ["models/base-2/other", "models/base/config.json", "models/base/deep/new.bin"]
    assert workspace.read_bytes("models/base/deep/new.bin") == b"new"


def test_stage_that_fails_leaves_the_old_and_no_remains(workspace: Workspace) -> None:
    workspace.write_bytes("models/base/old.bin", b"old")
    with pytest.raises(ZeroDivisionError), workspace.stage("models/base") as folder:
        (folder / "half.bin").write_bytes(b"half")
        raise ZeroDivisionError
    assert workspace.list() == ["models/base/old.bin"]
    assert not folder.exists()


def test_fetch_gives_a_local_copy_of_directory_and_file(workspace: Workspace) -> None:
    workspace.write_bytes("encoder/config.json", b"{}")
    workspace.write_bytes("encoder/deep/model", b"x" * 100)
    with workspace.fetch("encoder") as folder:
        found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        assert found == ["config.json", "deep/model"]
        assert (folder / "deep/model").read_bytes() == b"x" * 100
    with workspace.fetch("encoder/config.json") as file:
        assert file.name == "config.json"
        assert file.read_bytes() == b"{}"


def test_digest_is_of_names_and_content_alone(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = Workspace(tmp_path / "elsewhere")
    for place, top in ((workspace, "units"), (elsewhere, "copy/of")):
        place.write_bytes(f"{top}/a", b"1")
        place.write_bytes(f"{top}/deep/b", b"2")
    digest = workspace.digest("units")
    assert digest == elsewhere.digest("copy/of")
    workspace.write_json("units/_done/tokenize.json", {"seconds": 1})
    assert workspace.digest("units") == digest, "a marker is not content"
    workspace.write_bytes("units/deep/b", b"3")
    assert workspace.digest("units") != digest
    workspace.write_bytes("units/deep/b", b"2")
    workspace.write_bytes("units/c", b"")
    assert workspace.digest("units") != digest


def test_it_travels_to_workers_as_its_address(workspace: Workspace) -> None:
    workspace.write_bytes("a", b"x")
    other = pickle.loads(pickle.dumps(workspace))
    assert other.uri == workspace.uri
    assert other.read_bytes("a") == b"x"


def test_a_bucket_that_is_not_there_is_named(s3_server: str) -> None:
    with pytest.raises(BucketError, match="no-such-bucket"):
        Workspace("s3://no-such-bucket/run").list()


@pytest.mark.parametrize("uri", ["gs://bucket/run", "s3://", "s3:///run"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(WorkspaceError, match="s3://bucket/prefix"):
        Workspace(uri)


def test_deleting_more_objects_than_one_request_may_name(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server's limit is 1000, which takes a minute to fill.
    monkeypatch.setattr(buckets, "_DELETE_LIMIT", 3)
    workspace = Workspace(f"s3://{s3_bucket}/run")
    for index in range(7):
        workspace.write_bytes(f"many/{index}", b"")
    workspace.delete("many")
    assert workspace.list() == []


_KILLED_IN = {
    "stage": "with workspace.stage('models/base') as folder:\n    (folder / 'half').write_bytes(b'half'); die()",
    "write_bytes": "import os\nos.fsync = lambda handle: die()\nworkspace.write_bytes('models/base/old.bin', b'new')",
}


@pytest.mark.parametrize("moment", _KILLED_IN)
def test_kill_in_the_middle_leaves_the_old_content(tmp_path: Path, moment: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_bytes("models/base/old.bin", b"old")
    script = (
        "import os, signal\nfrom speechgpt.runtime.workspace import Workspace\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"workspace = Workspace({str(tmp_path)!r})\n{_KILLED_IN[moment]}"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert workspace.list() == ["models/base/old.bin"]
    assert workspace.read_bytes("models/base/old.bin") == b"old"
    with workspace.stage("models/base") as folder:
        (folder / "new").write_bytes(b"new")
    assert workspace.list() == ["models/base/new"], "the remains are in nobody's way"


def _fill_the_disk(folder: str, what: str, outcome: "multiprocessing.Queue[tuple[int | None, list[str]]]") -> None:
    """In a process that may write no file above 1 MB, which to it is a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    workspace = Workspace(folder)
    noise = os.urandom(4 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        if what == "bytes":
            workspace.write_bytes("units/part", noise)
        else:
            workspace.write_table("units/part", pa.table({"noise": [noise]}))
        outcome.put((None, workspace.list()))
    except OSError as error:
        outcome.put((error.errno, workspace.list()))


@pytest.mark.parametrize("what", ["bytes", "table"])
def test_a_full_disk_is_an_error_and_leaves_the_old_content(tmp_path: Path, what: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_bytes("units/part", b"old")
    spawn = multiprocessing.get_context("spawn")
    outcome: multiprocessing.Queue[tuple[int | None, list[str]]] = spawn.Queue()
    process = spawn.Process(target=_fill_the_disk, args=(str(tmp_path), what, outcome))
    process.start()
    error, listed = outcome.get(timeout=60)
    process.join()
    assert error == errno.EFBIG
    assert listed == ["units/part"]
    assert workspace.read_bytes("units/part") == b"old"
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_store_that_takes_nothing_is_an_error_in_words(s3_server, s3_bucket, monkeypatch) -> None:
    """As keys have it that may read and not write."""
    monkeypatch.setattr(patience, "_PAUSES", (0.0,))
    refused = lambda method, path: (403, "AccessDenied") if method == "PUT" else None  # noqa: E731
    with faulty(s3_server, refused) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(WorkspaceError, match=rf"s3://{s3_bucket}/run/a.json was not taken: .*ACCESS_DENIED"):
            Workspace(f"s3://{s3_bucket}/run").write_json("a.json", {})
