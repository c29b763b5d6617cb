"""A Ray cluster's job server, as the verbs submit, status, logs, stop and list use it.

Ray runs a submitted job once and forgets the submitter. Here are the parts it leaves to us: numbered attempts under
one stable id, and a log that is followed across lost connections.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
QUIET_SECONDS = 60.0
"""A log stream that says nothing for so long is opened anew: the far end of a cut connection never says goodbye."""
PATIENCE_SECONDS = 300.0
"""How long a cluster that was there may be out of reach before following gives up."""
RETRY_SECONDS = 2.0
AGENT_SECONDS = 60.0
"""How long a cluster may take to find a node that can run a job's driver."""


class ClusterError(Exception):
    """The cluster could not be reached, refused, or lacks what was asked of it; the message says what to do."""


def connect(address: str) -> "JobSubmissionClient":
    """A client of the job server at `address` (`http://head:8265`), authenticated with Ray's own token if there is one.

    Raises ClusterError when nothing answers there or the token is refused.
    """
    _use_token_if_present()
    import ray.job_submission

    url = address if "://" in address else f"http://{address}"
    with _speaking_to(url, "connect"), _environment(ADDRESS_VARIABLE, url):
        return ray.job_submission.JobSubmissionClient(url)


def attempts(client: "JobSubmissionClient", name: str) -> list["JobDetails"]:
    """All jobs submitted as `name`, `name-2`, `name-3` …, oldest first. Ray never takes an id twice."""
    with _speaking_to(client.get_address(), "list jobs"):
        jobs = client.list_jobs()
    numbered = {number: job for job in jobs if (number := _attempt(name, job.submission_id or "")) is not None}
    return [numbered[number] for number in sorted(numbered)]


def attempt_id(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def submit(client: "JobSubmissionClient", submission_id: str, request: dict[str, Any]) -> None:
    """Submit under an id that is used once, so that it may be tried again when the answer was lost.

    A cluster that has only just started has no agent to run the job yet. Raises ClusterError.
    """
    deadline = time.monotonic() + AGENT_SECONDS
    with _speaking_to(client.get_address(), f"submit {submission_id}"):
        while True:
            try:
                client.submit_job(submission_id=submission_id, **request)
                return
            except (OSError, RuntimeError) as error:
                passing = isinstance(error, OSError) or "No available agent" in str(error)
                if any(job.submission_id == submission_id for job in client.list_jobs()):
                    return
                if not passing or time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_SECONDS)


def details(client: "JobSubmissionClient", submission_id: str) -> "JobDetails":
    """Raises ClusterError when the cluster knows no such job."""
    with _speaking_to(client.get_address(), f"find job {submission_id!r}"):
        return client.get_job_info(submission_id)


def call(client: "JobSubmissionClient", what: str, request: Callable[[], Any]) -> Any:
    """`request()`, with its failures as ClusterError."""
    with _speaking_to(client.get_address(), what):
        return request()


def follow(
    client: "JobSubmissionClient",
    submission_id: str,
    emit: Callable[[str], None],
    notice: Callable[[str], None],
    patience: float = PATIENCE_SECONDS,
) -> "JobStatus":
    """Give each piece of the job's log to `emit` once, until the job ends; return its final status.

    A lost connection is opened again and what was already seen is skipped. Raises ClusterError after `patience`
    seconds out of reach; the job itself goes on.
    """
    with _speaking_to(client.get_address(), f"follow {submission_id}"):
        return asyncio.run(_follow(client, submission_id, _Once(emit), notice, patience))


class _Once:
    """Passes on a log that is read from its start again and again, each character once."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._emitted = 0
        self._position = 0

    def rewind(self) -> None:
        self._position = 0

    def lacks(self, whole: str) -> bool:
        """Whether the whole log has more than was passed on."""
        return len(whole) > self._emitted

    def __call__(self, text: str) -> None:
        fresh = text[max(0, self._emitted - self._position) :]
        self._position += len(text)
        self._emitted = max(self._emitted, self._position)
        if fresh:
            self._emit(fresh)


async def _follow(
    client: "JobSubmissionClient", submission_id: str, log: _Once, notice: Callable[[str], None], patience: float
) -> "JobStatus":
    import aiohttp

    reached = time.monotonic()
    while True:
        try:
            log.rewind()
            stream = client.tail_job_logs(submission_id)
            with contextlib.suppress(StopAsyncIteration, TimeoutError):
                while True:
                    log(await asyncio.wait_for(anext(stream), QUIET_SECONDS))
                    reached = time.monotonic()
            # A stream that was cut may only fall silent: what it did not bring is in the whole log.
            status = client.get_job_status(submission_id)
            whole = client.get_job_logs(submission_id)
            reached = time.monotonic()
            if log.lacks(whole):
                notice(f"connection to {client.get_address()} lost; going on where it was cut")
            log.rewind()
            log(whole)
            if status.is_terminal():
                return status
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise ClusterError(_refused(client.get_address(), str(error))) from None
            lost: Exception = error
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if "does not exist" in str(error):
                # The cluster was started anew; jobs die with their cluster.
                raise
            lost = error
        else:
            continue
        if time.monotonic() - reached > patience:
            raise ClusterError(
                f"{client.get_address()} is out of reach for {patience:.0f} s ({lost}); the job may well go on: "
                f"speechgpt logs {submission_id} --follow"
            )
        notice(f"connection to {client.get_address()} lost ({lost}); trying again")
        await asyncio.sleep(RETRY_SECONDS)


def _attempt(name: str, submission_id: str) -> int | None:
    if submission_id == name:
        return 1
    head, _, number = submission_id.rpartition("-")
    return int(number) if head == name and number.isdecimal() and int(number) > 1 else None


def _use_token_if_present() -> None:
    """Ray sends its token only in token mode, which `ray start` enters by itself when a token exists; so do we."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Ray prefers RAY_API_SERVER_ADDRESS and RAY_ADDRESS over the address it is given; here the given one must win."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _speaking_to(address: str, what: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(_refused(address, str(error).splitlines()[0])) from None
    except OSError as error:
        raise ClusterError(
            f"no Ray job server answers at {address} ({error}); is the cluster up, and is --address its dashboard "
            "(http://HEAD:8265, through a tunnel or port-forward if it is not public)?"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"{address}: cannot {what}: {str(error).strip().splitlines()[-1]}") from None


def _refused(address: str, reason: str) -> str:
    return (
        f"{address} refused the token ({reason}); set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it, "
        "to the token the cluster was started with (`ray get-auth-token` on its head shows it)"
    )
