import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs.shell import JobError
from jobs.stage_failure import fitted, reason


def carried(text: str) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(OSError(), f"Traceback (most recent call last):\n  File x\nOSError: {text}\n")


def test_what_a_worker_raised_comes_before_what_its_peers_lost():
    lost = carried("Connection closed by peer [127.0.0.1]:1")
    error = WorkerGroupError("…", {0: lost, 1: carried("shard-1.pt was not taken"), 2: lost})
    first, second = reason(error).split("; ")
    assert first == "OSError: shard-1.pt was not taken (worker 1)"
    assert second.endswith("(worker 0, 2)")


def test_a_controllers_failure_is_its_own():
    assert reason(ControllerError(RuntimeError("no room"))) == "no room"


def test_a_training_that_fails_for_good_fails_its_job_in_words():
    class Failing:
        def fit(self) -> None:
            raise WorkerGroupError("…", {0: carried("shard-1.pt was not taken")})

    with pytest.raises(JobError, match=r"training the vocoder failed.*OSError: shard-1.pt was not taken \(worker 0\)"):
        fitted(Failing(), "training the vocoder")  # type: ignore[arg-type]
