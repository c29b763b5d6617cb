"""One file from a host that misbehaves: the whole file gets its name in the end, or nothing does."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speechgpt.interop.mirror import Mirror
from speechgpt.interop.partial import Partial, PartialError
from speechgpt.interop.transfer import FRUITLESS_ATTEMPTS, LONGEST_WAIT, Expected, Transfer, TransferError
from speechgpt.runtime.progress import Progress

PATH = "/hubert/model.pt"
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = random.Random(1).randbytes(300_000)
KNOWN = Expected(SHA256, len(CONTENT))
UNKNOWN = Expected()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def transfer(pauses: list[float]) -> Iterator[Transfer]:
    made = Transfer(Mirror(), Progress(silent=True), pauses.append)
    yield made
    made.close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mhubert" / "model.pt"


def leftovers(target: Path) -> list[str]:
    """Everything beside the target."""
    return sorted(file.name for file in target.parent.iterdir() if file != target) if target.parent.is_dir() else []


def test_a_file_comes_whole_and_checked(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    arrived = transfer.fetch([host.url + PATH], target, KNOWN)
    assert target.read_bytes() == CONTENT
    assert (arrived.sha256, arrived.bytes, arrived.proof, arrived.resumed) == (SHA256, len(CONTENT), "published", 0)
    assert leftovers(target) == []


def test_a_dropped_connection_goes_on_where_it_broke(
    host: Any, transfer: Transfer, target: Path, pauses: list[float]
) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000), host.drops_after(50_000)]
    transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert target.read_bytes() == CONTENT
    assert host.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert pauses == [1, 1]


def test_a_later_process_goes_on_too(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000)] + [host.answers(503)] * FRUITLESS_ATTEMPTS
    with pytest.raises(TransferError, match="503.*100000 bytes are kept"):
        transfer.fetch([host.url + PATH], target, KNOWN)
    assert not target.exists()
    host.asked.clear()
    arrived = transfer.fetch([host.url + PATH], target, KNOWN)
    assert host.ranges == ["bytes=100000-"]
    assert arrived.resumed == 100_000 and target.read_bytes() == CONTENT


@pytest.mark.parametrize("expected", [KNOWN, UNKNOWN])
def test_a_host_without_ranges_starts_again(host: Any, transfer: Transfer, target: Path, expected: Expected) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000), host.drops_after(200_000, ranges=False), host.sends(CONTENT, False)]
    transfer.fetch([host.url + PATH], target, expected)
    assert target.read_bytes() == CONTENT


def test_a_host_that_always_breaks_at_the_same_place_is_given_up(
    host: Any, transfer: Transfer, target: Path, pauses: list[float]
) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000, ranges=False)] * 50
    with pytest.raises(TransferError, match="the connection broke"):
        transfer.fetch([host.url + PATH], target, KNOWN)
    assert len(host.asked) == 1 + FRUITLESS_ATTEMPTS
    assert pauses == sorted(pauses) and pauses[-1] > pauses[0]
    assert not target.exists()


@pytest.mark.parametrize("expected", [Expected(hashlib.sha256(OTHER).hexdigest()), UNKNOWN])
def test_a_file_that_changes_between_two_attempts_is_never_glued(
    host: Any, transfer: Transfer, target: Path, expected: Expected
) -> None:
    def changes(handler: Any, content: bytes) -> bool:
        host.files[PATH] = OTHER
        return False

    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000), changes]
    transfer.fetch([host.url + PATH], target, expected)
    assert target.read_bytes() == OTHER


def test_a_part_of_another_file_is_not_taken(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000), host.sends_part_unasked(OTHER)]
    transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert target.read_bytes() == CONTENT
    assert host.ranges == [None, "bytes=100000-", None]


def test_a_part_that_ends_early_is_not_taken_for_the_rest(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000), host.sends_at_most(50_000)]
    transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert target.read_bytes() == CONTENT
    assert host.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_wrong_bytes_are_deleted_and_fetched_anew(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.sends(OTHER)]
    transfer.fetch([host.url + PATH], target, KNOWN)
    assert target.read_bytes() == CONTENT
    assert len(host.asked) == 2


def test_wrong_bytes_twice_are_refused(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = OTHER
    with pytest.raises(TransferError) as caught:
        transfer.fetch([host.url + PATH], target, KNOWN)
    assert SHA256 in str(caught.value) and hashlib.sha256(OTHER).hexdigest() in str(caught.value)
    assert PATH in str(caught.value)
    assert len(host.asked) == 2
    assert not target.exists() and leftovers(target) == []


@pytest.mark.parametrize("expected", [KNOWN, Expected(None, len(CONTENT))])
def test_a_wrong_length_is_refused_before_it_is_fetched(
    host: Any, transfer: Transfer, target: Path, expected: Expected
) -> None:
    host.files[PATH] = CONTENT + b"more"
    with pytest.raises(TransferError, match="300000 bytes is expected, 300004 found"):
        transfer.fetch([host.url + PATH], target, expected)
    assert not target.exists() and leftovers(target) == []


def test_wrong_bytes_of_a_resumed_file_start_again(host: Any, transfer: Transfer, target: Path) -> None:
    """What an earlier process left was damaged: the hash says so, and the file comes anew."""
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.drops_after(100_000)] + [host.answers(503)] * FRUITLESS_ATTEMPTS
    with pytest.raises(TransferError):
        transfer.fetch([host.url + PATH], target, KNOWN)
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    transfer.fetch([host.url + PATH], target, KNOWN)
    assert target.read_bytes() == CONTENT


def test_a_busy_host_is_asked_when_it_wants(host: Any, transfer: Transfer, target: Path, pauses: list[float]) -> None:
    host.files[PATH] = CONTENT
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    host.faults[PATH] = [
        host.answers(503, retry_after="7"),
        host.answers(429, retry_after="86400"),
        host.answers(503, retry_after=later),
    ]
    transfer.fetch([host.url + PATH], target, KNOWN)
    assert pauses[:2] == [7, LONGEST_WAIT] and 50 < pauses[2] <= 60
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_not_there_is_not_asked_for_again(host: Any, transfer: Transfer, target: Path) -> None:
    with pytest.raises(TransferError, match="404"):
        transfer.fetch([host.url + PATH], target, KNOWN)
    assert len(host.asked) == 1
    assert not target.exists() and leftovers(target) == []


def test_the_next_address_is_tried(serve_host: Callable[[], Any], transfer: Transfer, target: Path) -> None:
    gone, there = serve_host(), serve_host()
    there.files[PATH] = CONTENT
    arrived = transfer.fetch([gone.url + PATH, there.url + PATH], target, KNOWN)
    assert arrived.origin == there.url + PATH and target.read_bytes() == CONTENT


def test_bytes_of_one_address_are_not_gone_on_with_at_another(
    serve_host: Callable[[], Any], transfer: Transfer, target: Path
) -> None:
    breaks, there = serve_host(), serve_host()
    breaks.files[PATH], there.files[PATH] = OTHER, CONTENT
    breaks.faults[PATH] = [breaks.drops_after(100_000)] + [breaks.answers(503)] * FRUITLESS_ATTEMPTS
    transfer.fetch([breaks.url + PATH, there.url + PATH], target, UNKNOWN)
    assert target.read_bytes() == CONTENT and there.ranges == [None]


def test_a_locked_file_says_how_to_get_it(host: Any, transfer: Transfer, target: Path) -> None:
    host.faults[PATH] = [host.answers(401)]
    with pytest.raises(TransferError, match="--mirror"):
        transfer.fetch([host.url + PATH], target, KNOWN)


def test_a_host_that_is_not_there(transfer: Transfer, target: Path, pauses: list[float]) -> None:
    with pytest.raises(TransferError, match="connection broke"):
        transfer.fetch(["http://127.0.0.1:9/model.pt"], target, KNOWN)
    assert len(pauses) == FRUITLESS_ATTEMPTS - 1
    assert not target.exists() and leftovers(target) == []


def test_without_any_length_a_cut_file_is_not_taken_for_whole(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.faults[PATH] = [host.sends_without_length(100_000)] * 2
    with pytest.raises(TransferError, match="states no length"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert not target.exists()
    host.faults[PATH] = [host.sends_without_length(100_000), host.sends_without_length(len(CONTENT))]
    transfer.fetch([host.url + PATH], target, KNOWN)
    assert target.read_bytes() == CONTENT


def test_the_hash_that_the_hub_states_is_checked(
    host: Any, serve_host: Callable[[], Any], transfer: Transfer, target: Path
) -> None:
    """The Hub answers with a redirect to its store, and says there what the file's hash and length are."""
    store = serve_host()
    store.files["/blob"] = CONTENT
    stated = {"x_linked_etag": f'"{SHA256}"', "x_linked_size": str(len(CONTENT)), "location": f"{store.url}/blob"}
    host.faults[PATH] = [host.answers(302, **stated)] * 10
    arrived = transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert (arrived.proof, target.read_bytes()) == ("host", CONTENT)
    target.unlink()
    store.files["/blob"] = OTHER
    with pytest.raises(TransferError, match=f"sha256 {SHA256} is expected"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert not target.exists() and leftovers(target) == []


def test_a_host_whose_file_is_another_by_now_is_not_fetched_from(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = OTHER
    host.headers["x-linked-etag"] = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(TransferError, match="another file"):
        transfer.fetch([host.url + PATH], target, KNOWN)
    assert len(host.asked) == 1


def test_nothing_stated_is_said(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    arrived = transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert (arrived.proof, arrived.sha256) == ("none", SHA256)


@pytest.mark.parametrize(
    "url", ["http://example.org/model.pt", "ftp://example.org/model.pt", "file:///etc/hostname", "//example.org/x"]
)
def test_only_https_and_this_machine(transfer: Transfer, target: Path, url: str) -> None:
    with pytest.raises(TransferError, match="only https"):
        transfer.fetch([url], target, KNOWN)


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "http://example.org/x"])
def test_redirects_stay_on_allowed_schemes_and_hosts(
    host: Any, transfer: Transfer, target: Path, location: str
) -> None:
    host.faults[PATH] = [host.answers(302, location=location)]
    with pytest.raises(TransferError, match="redirects to|only https"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert not target.exists()


def test_redirects_in_a_circle_end(host: Any, transfer: Transfer, target: Path) -> None:
    host.faults[PATH] = [host.answers(302, location=PATH)] * 100
    with pytest.raises(TransferError, match="redirects"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)


def test_a_compressing_host_is_refused(host: Any, transfer: Transfer, target: Path) -> None:
    host.files[PATH] = CONTENT
    host.headers["content-encoding"] = "gzip"
    with pytest.raises(TransferError, match="compressed"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert not target.exists()


def test_a_disk_without_room_is_named_before_the_first_byte(host: Any, transfer: Transfer, target: Path) -> None:
    host.faults[PATH] = [host.answers(200, content_length=str(1 << 60))]
    with pytest.raises(TransferError, match="make room"):
        transfer.fetch([host.url + PATH], target, UNKNOWN)


def test_two_processes_do_not_write_one_file(target: Path) -> None:
    with Partial(target), pytest.raises(PartialError, match="another process"):
        Partial(target)


def _download(url: str, target: Path) -> None:
    Transfer(Mirror(), Progress(silent=True)).fetch([url], target, UNKNOWN)


def test_a_killed_process_leaves_no_whole_name_and_is_gone_on_from(host: Any, transfer: Transfer, target: Path) -> None:
    content = CONTENT * 40
    host.files[PATH] = content
    host.faults[PATH] = [host.sends_slowly(1 << 19, 0.2)]
    process = multiprocessing.get_context("spawn").Process(target=_download, args=(host.url + PATH, target))
    process.start()
    part = target.with_name(f".{target.name}.part")
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size > 2 << 20) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    arrived = transfer.fetch([host.url + PATH], target, UNKNOWN)
    assert arrived.resumed > 2 << 20 and host.ranges[-1] == f"bytes={arrived.resumed}-"
    assert target.read_bytes() == content and leftovers(target) == []


def test_a_process_killed_at_the_last_moment_asks_for_nothing_twice(
    host: Any, transfer: Transfer, target: Path
) -> None:
    """Every byte is there, only the name is not: the host says that there is no more, and the file is checked."""
    host.files[PATH] = CONTENT
    with Partial(target) as partial:
        partial.begin({"url": host.url + PATH, "validator": None})
        partial.write(CONTENT)
    arrived = transfer.fetch([host.url + PATH], target, Expected(SHA256))
    assert arrived.resumed == len(CONTENT) and target.read_bytes() == CONTENT
    assert host.ranges == [f"bytes={len(CONTENT)}-"]
