import os
import subprocess
import sys
import threading
import time

import pytest

from speechgpt.training import node_local


def test_one_of_many_makes_it_and_all_find_it(tmp_path):
    made, found = [], []

    def make(partial):
        made.append(partial)
        time.sleep(0.2)
        partial.write_text("whole")

    def want():
        found.append(node_local.made_once(tmp_path / "thing", make).read_text())

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == ["whole"] * 4
    node_local.forget(tmp_path / "thing")
    node_local.forget(tmp_path / "thing")
    assert not list(tmp_path.iterdir())


def test_after_a_failure_the_next_one_tries_from_nothing(tmp_path):
    def fails(partial):
        partial.mkdir()
        (partial / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        node_local.made_once(tmp_path / "thing", fails)
    assert not (tmp_path / "thing").exists()
    node_local.made_once(tmp_path / "thing", lambda partial: partial.mkdir())
    assert not list((tmp_path / "thing").iterdir())


def test_scratch_of_the_dead_is_removed_and_of_the_living_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(node_local.tempfile, "tempdir", str(tmp_path))
    mine = node_local.scratch("checkpoint")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = node_local.directory() / f"checkpoint-{process.pid}-abc"
    left.mkdir()
    other = node_local.scratch("checkpoint")
    assert mine != other and mine.is_dir() and f"-{os.getpid()}-" in mine.name
    assert not left.exists()
