"""An S3 server's neighbour that fails now and then: it passes requests on, and answers some with 503 instead."""

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "server", "date"}


class Flaky(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, endpoint: str, share: float, seed: int = 1) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.share = urlsplit(endpoint).netloc, share
        self.asked = self.failed = 0
        self._dice, self._lock = random.Random(seed), threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fails(self) -> bool:
        with self._lock:
            self.asked += 1
            fails = self._dice.random() < self.share
            self.failed += fails
            return fails


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def _pass_on(self) -> None:
        body = self._body()
        if self.server.fails():
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>")
            return
        behind = http.client.HTTPConnection(self.server.behind, timeout=120)
        behind.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in _HOP})
        answer = behind.getresponse()
        content = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        behind.close()
        self._answer(answer.status, kept, content)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            # Of a HEAD it says how long the object is.
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        elif not any(name.lower() == "content-length" for name in headers):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD" and content:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def flaky(endpoint: str, share: float) -> Iterator[Flaky]:
    """Before `endpoint`, failing that share of the requests."""
    server = Flaky(endpoint, share)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
