"""An HTTP service that answers as it is told, for the clients of services."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, content."""


class ToldService:
    """Gives its answers one a request, the last for ever; one that is a function is asked what to say to the body.

    asked: what came, each its JSON body with `path` and `key` (the header `authorization`).
    """

    def __init__(self, *answers: Answer | Callable[[dict[str, Any]], Answer]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._left, self._lock = list(answers), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> Answer:
        with self._lock:
            self.asked.append({"path": path, "key": key, **body})
            told = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        return told(body) if callable(told) else told

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, headers, content = service.answer(self.path, self.headers.get("authorization"), body)
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def told_services() -> Iterator[Callable[..., ToldService]]:
    """Starts services; they end with the block."""
    with ExitStack() as running:

        def start(*answers: Any) -> ToldService:
            service = ToldService(*answers)
            running.callback(service.close)
            return service

        yield start


def chat(content: Any) -> Answer:
    """A chat route's answer that says `content`."""
    body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return 200, {"content-type": "application/json"}, json.dumps(body).encode()
