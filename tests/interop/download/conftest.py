"""A real HTTP server that can misbehave in every way that hosts of large files do."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Fault = Callable[["Handler", bytes], bool]
"""Answers a request itself and says True, or leaves it to the well-behaved server."""


@dataclass
class Host:
    """files: path to content. faults: what goes wrong, one a request of that path, in order. asked: path, Range header.

    headers: sent with every answer. The methods below make faults.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [wanted for _, wanted in self.asked]

    def drops_after(self, bytes: int, ranges: bool = True) -> Fault:
        """Closes the connection in the middle of the body."""
        return lambda handler, content: handler.serve(content, ranges=ranges, cut=bytes) is None

    def answers(self, status: int, body: bytes = b"", **headers: str) -> Fault:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return lambda handler, content: handler.answer(status, body, named) is None

    def sends(self, content: bytes, ranges: bool = True) -> Fault:
        """Another file than it should."""
        return lambda handler, _: handler.serve(content, ranges=ranges) is None

    def sends_part_unasked(self, content: bytes) -> Fault:
        """A part of another file, whatever If-Range says."""

        def fault(handler: "Handler", _: bytes) -> bool:
            start = int((handler.headers.get("range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            span = {"content-range": f"bytes {start}-{len(content) - 1}/{len(content)}", "etag": '"another"'}
            handler.answer(206, content[start:], span)
            return True

        return fault

    def sends_at_most(self, most: int) -> Fault:
        """A part that is shorter than was asked for and ends as it should."""

        def fault(handler: "Handler", content: bytes) -> bool:
            start = int((handler.headers.get("range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            part = content[start : start + most]
            span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            handler.answer(206, part, {"content-range": span, "etag": handler.etag(content)})
            return True

        return fault

    def sends_without_length(self, bytes: int) -> Fault:
        """As HTTP/1.0 does: the body ends where the connection ends, here after so many bytes."""

        def fault(handler: "Handler", content: bytes) -> bool:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(content[:bytes])
            handler.drop()
            return True

        return fault

    def sends_slowly(self, piece: int, seconds: float) -> Fault:
        def fault(handler: "Handler", content: bytes) -> bool:
            handler.send_response(200)
            handler.send_header("content-length", str(len(content)))
            handler.send_header("etag", handler.etag(content))
            handler.end_headers()
            for start in range(0, len(content), piece):
                handler.wfile.write(content[start : start + piece])
                time.sleep(seconds)
            return True

        return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: Host

    def do_GET(self) -> None:
        self.host.asked.append((self.path, self.headers.get("range")))
        waiting = self.host.faults.get(self.path)
        if waiting and waiting.pop(0)(self, self.host.files.get(self.path, b"")):
            return
        content = self.host.files.get(self.path)
        if content is None:
            self.answer(404, b"no such file")
            return
        self.serve(content)

    def etag(self, content: bytes) -> str:
        return f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    def serve(self, content: bytes, ranges: bool = True, cut: int | None = None) -> None:
        """Send a file as RFC 9110 has it; `cut` closes the connection after so many bytes of the body."""
        etag = self.etag(content)
        start = 0
        wanted = self.headers.get("range") if ranges else None
        if wanted and self.headers.get("if-range") in (None, etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            self.answer(416, b"", {"content-range": f"bytes */{len(content)}"})
            return
        headers = {"etag": etag}
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, content[start:], headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **self.host.headers, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.drop()

    def drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are the point here."""


@pytest.fixture
def serve_host() -> Iterator[Callable[[], Host]]:
    """Starts hosts on free ports of this machine."""
    servers: list[ThreadingHTTPServer] = []

    def start() -> Host:
        handler = type("HandlerOfOneHost", (Handler,), {})
        server = _QuietServer(("127.0.0.1", 0), handler)
        handler.host = Host(f"http://127.0.0.1:{server.server_address[1]}")
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return handler.host

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def host(serve_host: Callable[[], Host]) -> Host:
    return serve_host()
