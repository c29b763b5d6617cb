"""One published file brought here: resumed where it was cut, checked, and under its name only when it is whole.

Over httpx, for the Hub's files, too. huggingface_hub's own downloader checks a file's length but not its hash, resumes
without `If-Range` (a file that changed meanwhile is glued to the old one's beginning), and knows the Hub alone, while
the encoder, its codebook and the vocoder lie elsewhere. What it would add, parallel chunks by Xet, none of these files
needs. The hash that the Hub states of a large file (`X-Linked-ETag`) is read here as well.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urljoin, urlsplit

import httpx

from speechgpt.interop.mirror import AddressError, Mirror
from speechgpt.interop.partial import Partial
from speechgpt.runtime.progress import Progress

FRUITLESS_ATTEMPTS = 5
"""Attempts in a row that bring no byte more than those before, until a host is given up."""
WRONG_ATTEMPTS = 2
"""Times that a whole file may turn out to be another than was published."""
LONGEST_WAIT = 120.0
"""Seconds; a host that asks for more is taken at its word no further."""
_HOPS = 10
_CHUNK = 1 << 20
_MB = 1e6
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHA256 = re.compile(r"[0-9a-f]{64}")

Proof = Literal["published", "host", "none"]
"""Whose SHA-256 the file has: the one in our table, the one that its host states, or nobody has stated any."""


class TransferError(RuntimeError):
    """A file that could not be brought here; the message says what happened at which address."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None is unknown."""

    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Arrived:
    """A file under its name. origin: the URL or path it came from. resumed: bytes of it that were here before."""

    path: Path
    origin: str
    bytes: int
    sha256: str
    proof: Proof
    resumed: int


@dataclass(frozen=True)
class _Stated:
    """What a host says of a file beside sending it."""

    sha256: str | None
    bytes: int | None


class _Cut(Exception):
    """A try that ended early and may be repeated. `wait`: seconds that the host asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Wrong(Exception):
    """The host has another file than the one that was published."""


class Transfer:
    """Downloads through one connection pool.

    wait: how pauses are spent, in seconds. Every method raises TransferError.
    """

    def __init__(self, mirror: Mirror, progress: Progress, wait: Callable[[float], None] = time.sleep) -> None:
        self.mirror = mirror
        self._progress = progress
        self._wait = wait
        self._client = httpx.Client(timeout=httpx.Timeout(60, connect=30), headers={"accept-encoding": "identity"})

    def close(self) -> None:
        self._client.close()

    def fetch(self, urls: Sequence[str], target: Path, expected: Expected) -> Arrived:
        """Bring a file from the first of several addresses that has it."""
        problems: list[str] = []
        for url in urls:
            try:
                # From here on the mirror's address: bytes of one mirror are not gone on with from another.
                return self._from(self.mirror.url(url), target, expected)
            except TransferError as error:
                problems.append(str(error))
        raise TransferError("\n".join(problems))

    def copy(self, places: Sequence[Path], target: Path, expected: Expected) -> Arrived:
        """Copy a file from the first of several places in a mirror folder where it is."""
        source = next((place for place in places if place.is_file()), None)
        if source is None:
            looked = "\n  ".join(str(place) for place in dict.fromkeys(places))
            raise TransferError(f"{target.name}: the mirror folder has none of\n  {looked}")
        total = source.stat().st_size
        with Partial(target) as partial:
            partial.restart()
            _check_room(target, total)
            with (
                source.open("rb") as file,
                self._progress.count(target.name, total / _MB, "MB") as counter,
            ):
                while chunk := file.read(_CHUNK):
                    partial.write(chunk)
                    counter.reach(partial.size / _MB)
            if problem := _problem(partial, expected, _Stated(None, total)):
                partial.discard()
                raise TransferError(f"{source}: {problem}; replace it in the mirror")
            return _publish(partial, expected, _Stated(None, None), str(source))

    def _from(self, url: str, target: Path, expected: Expected) -> Arrived:
        with Partial(target) as partial:
            most, fruitless, wrong = partial.size, 0, 0
            while True:
                try:
                    stated = self._attempt(url, partial, expected)
                except _Wrong as wrong_file:
                    partial.discard()
                    raise TransferError(f"{url}: {wrong_file}") from None
                except _Cut as cut:
                    fruitless = 0 if partial.size > most else fruitless + 1
                    most = max(most, partial.size)
                    if fruitless >= FRUITLESS_ATTEMPTS:
                        kept = f"; {partial.size} bytes are kept, a further try goes on from there"
                        raise TransferError(f"{url}: {cut}{kept if partial.size else ''}") from None
                    pause = min(cut.wait if cut.wait is not None else 2.0 ** max(fruitless - 1, 0), LONGEST_WAIT)
                    self._progress.say(f"{target.name}: {cut}; again in {pause:g} s")
                    self._wait(pause)
                    continue
                except (httpx.HTTPError, httpx.InvalidURL, AddressError) as error:
                    raise TransferError(f"{url}: {error or type(error).__name__}") from None
                problem = _problem(partial, expected, stated)
                if problem is None:
                    return _publish(partial, expected, stated, url)
                wrong += 1
                most = 0
                if wrong == WRONG_ATTEMPTS:
                    partial.discard()
                    raise TransferError(f"{url}: {problem}; nothing of it is kept")
                partial.restart()
                self._progress.say(f"{target.name}: {problem}; it is deleted and fetched anew")

    def _attempt(self, url: str, partial: Partial, expected: Expected) -> _Stated:
        """One request, until its end. Raises _Cut, _Wrong."""
        if partial.size and not _can_go_on(partial, url, expected):
            partial.restart()
        offset = partial.size
        headers = {"range": f"bytes={offset}-"} if offset else {}
        if offset and (validator := partial.origin.get("validator")):
            headers["if-range"] = validator
        try:
            with self._open(url, headers) as (response, stated):
                self._receive(response, stated, url, partial, expected)
                return stated
        except httpx.TransportError as error:
            raise _Cut(f"the connection broke ({error or type(error).__name__})") from None

    def _receive(
        self, response: httpx.Response, stated: _Stated, url: str, partial: Partial, expected: Expected
    ) -> None:
        if expected.sha256 and stated.sha256 and stated.sha256 != expected.sha256:
            raise _Wrong(f"its host now has another file: sha256 {expected.sha256} is expected, {stated.sha256} stated")
        if response.status_code == 416:
            if _complete_length(response) == partial.size:
                return
            partial.restart()
            raise _Cut("the host has fewer bytes than came before; it is fetched anew")
        _check_status(response)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _Cut("the host sent it compressed, though asked not to")
        validator = _validator(response)
        if response.status_code == 206:
            start, total = _content_range(response)
            same = partial.origin.get("validator") in (None, validator)
            if start != partial.size or not same:
                partial.restart()
                raise _Cut("the host answered with a part of another file; it is fetched anew")
        else:
            # A host that ignores Range, or whose file has changed, sends it whole.
            partial.restart()
            total = int(response.headers["content-length"]) if "content-length" in response.headers else None
        known = total or stated.bytes or expected.bytes
        for length, who in ((expected.bytes, "is expected"), (stated.bytes, "its host states")):
            if length and total and total != length:
                raise _Wrong(f"a length of {length} bytes {who}, {total} found; nothing of it is kept")
        if not known and not expected.sha256 and response.headers.get("transfer-encoding") != "chunked":
            raise _Wrong("its host states no length, so that a file cut short could not be told from a whole one")
        _check_room(partial.target, (known or 0) - partial.size)
        partial.begin({"url": url, "validator": validator})
        with self._progress.count(
            partial.target.name, known / _MB if known else None, "MB", partial.size / _MB
        ) as counter:
            # Without a chunk size: httpx would hold back what has come of the last chunk when the connection breaks.
            for chunk in response.iter_raw():
                partial.write(chunk)
                counter.reach(partial.size / _MB)
                if known and partial.size > known:
                    break
        if known and partial.size < known:
            # A host may send less than it was asked for and end properly (RFC 9110, 15.3.7).
            raise _Cut(f"{partial.size} of {known} bytes came")

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[tuple[httpx.Response, _Stated]]:
        """The answer at the end of the redirects, each of which is checked, and what the hosts on the way stated."""
        sha256, length = None, None
        for _ in range(_HOPS):
            self.mirror.check(url)
            with self._client.stream("GET", url, headers=headers, follow_redirects=False) as response:
                etag = response.headers.get("x-linked-etag", "").strip('"')
                sha256 = sha256 or (etag if _SHA256.fullmatch(etag) else None)
                linked = response.headers.get("x-linked-size", "")
                length = length or (int(linked) if linked.isdigit() else None)
                if not response.has_redirect_location:
                    yield response, _Stated(sha256, length)
                    return
                following = urljoin(url, response.headers["location"])
            if urlsplit(following).scheme not in (urlsplit(url).scheme, "https"):
                raise AddressError(f"it redirects to {following}, away from {urlsplit(url).scheme}")
            url = following
        raise AddressError(f"more than {_HOPS} redirects")


def _can_go_on(partial: Partial, url: str, expected: Expected) -> bool:
    """Whether further bytes of the same file can be had: its host can tell it from another, or its hash will."""
    same = partial.origin.get("url") == url
    return same and bool(partial.origin.get("validator") or expected.sha256)


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in _BUSY:
        raise _Cut(f"its host answers {status} {response.reason_phrase}", _retry_after(response))
    if status in (401, 403):
        raise TransferError(
            f"{response.url}: {status}, its host asks who you are: fetch it as the host wants it "
            "and give the folder as --mirror"
        )
    if status in (404, 410):
        raise TransferError(f"{response.url}: {status}, it is not there (any more)")
    raise TransferError(f"{response.url}: its host answers {status} {response.reason_phrase}")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a busy host asks for (RFC 9110, 10.2.3: a number, or a date)."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _validator(response: httpx.Response) -> str | None:
    """What `If-Range` takes: a strong ETag, else the date of the last change (RFC 9110, 13.1.5)."""
    etag = response.headers.get("etag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("last-modified")


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """First byte and complete length of a part."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", "").strip())
    if not match:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _complete_length(response: httpx.Response) -> int | None:
    match = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", "").strip())
    return int(match[1]) if match else None


def _check_room(target: Path, wanted: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if wanted > free:
        raise TransferError(
            f"{target}: {wanted / _MB:,.0f} MB are to come, {free / _MB:,.0f} MB are free; "
            "make room, or choose another disk with --to"
        )


def _problem(partial: Partial, expected: Expected, stated: _Stated) -> str | None:
    """What is wrong with bytes that are all there."""
    length = expected.bytes or stated.bytes
    if length and partial.size != length:
        return f"{length} bytes are expected, {partial.size} came"
    sha256 = expected.sha256 or stated.sha256
    if sha256 and partial.sha256 != sha256:
        return f"sha256 {sha256} is expected, {partial.sha256} found"
    return None


def _publish(partial: Partial, expected: Expected, stated: _Stated, origin: str) -> Arrived:
    proof: Proof = "published" if expected.sha256 else "host" if stated.sha256 else "none"
    arrived = Arrived(partial.target, origin, partial.size, partial.sha256, proof, partial.resumed)
    partial.publish()
    return arrived
