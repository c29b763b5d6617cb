"""A store that fails now and then is asked again; what is wrong for good is said at once."""

import errno

import flaky_store
import numpy as np
import pytest

from speechgpt.runtime import buckets, files, patience
from speechgpt.runtime.recordings import inspect, read_manifests
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio


def test_objects_smaller_than_the_answer_too_busy_come_and_go_all_the_same(s3_server, s3_bucket, monkeypatch):
    """Arrow does not ask again for these: S3's answer is longer than the object."""
    monkeypatch.setattr(patience, "_PAUSES", (0.05,) * 8)
    with flaky_store.flaky(s3_server, share=0.2) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        buckets.filesystem.cache_clear()
        buckets._client.cache_clear()
        try:
            place = Workspace(f"s3://{s3_bucket}/work")
            for number in range(12):
                place.write_bytes(f"small/{number}", b"%d" % number)
            assert [place.read_bytes(f"small/{number}") for number in range(12)] == [b"%d" % n for n in range(12)]
            paths = [place.path(f"small/{number}") for number in range(12)]
            assert [files.read_bytes(path) for path in paths] == [b"%d" % number for number in range(12)]
            place.write_bytes("a.flac", audio.encode(np.ones(1600, np.float32), "flac"))
            cuts = [place.path(f"a.flac#t=0.0{number},0.09") for number in range(9)]
            assert [facts.seconds for facts in inspect(cuts)] == pytest.approx([0.09 - n / 100 for n in range(9)])
            place.write_bytes("m.jsonl", b'{"id": "a", "path": "small/1"}')
            for _ in range(6):
                assert [row["id"] for row in read_manifests([place.path("m.jsonl")]).rows] == ["a"]
            found = inspect([*paths, place.path("gone")])
            assert [facts.error is None for facts in found] == [True] * 12 + [False]
        finally:
            buckets.filesystem.cache_clear()
            buckets._client.cache_clear()
    assert store.failed > 5


def test_what_does_not_pass_is_raised_at_once(monkeypatch):
    monkeypatch.setattr(patience, "_PAUSES", (0.0, 0.0))
    tried = []

    def fails(error: OSError) -> None:
        tried.append(error)
        raise error

    for error, times in ((OSError("busy"), 3), (FileNotFoundError("gone"), 1), (OSError(errno.ENOSPC, "full"), 1)):
        tried.clear()
        with pytest.raises(type(error)):
            patience.patiently(lambda error=error: fails(error))
        assert len(tried) == times
