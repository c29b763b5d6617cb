"""A proxy before an S3 server that fails as S3 does at times: for tests of what is written through it."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_REFUSAL = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s</Message></Error>'
_HOP = {"connection", "transfer-encoding", "host", "content-length", "server", "date"}

Fault = Callable[[str, str], tuple[int, str] | float | None]
"""(method, path) -> a status and an S3 error code to answer with, seconds to wait first, or None to pass it on."""


@contextmanager
def faulty(endpoint: str, fault: Fault) -> Iterator[str]:
    """Gives the address of a server that passes requests on to `endpoint`, but for what `fault` says."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self._body()
            wanted = fault(self.command, self.path)
            if isinstance(wanted, tuple):
                status, code = wanted
                self._answer(status, {"Content-Type": "application/xml"}, _REFUSAL % (code.encode(), b"injected"))
                return
            if wanted:
                time.sleep(wanted)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            # urllib would call it a form, which the server would take apart.
            headers.setdefault("Content-Type", "application/octet-stream")
            request = urllib.request.Request(endpoint + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    self._answer(answer.status, answer.headers, answer.read())
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.headers, error.read())

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                pieces = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
