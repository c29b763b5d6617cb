"""Where spans go; that a request's go through all deployments shows test_service.py."""

import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from ray._common.utils import import_attr
from ray.serve._private import tracing_utils

from serve import traces
from serve.run import ServeError, start
from speechgpt import recipe
from speechgpt.runtime import proxies
from speechgpt.runtime.config import ServingSection, TracesSection


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    """What came to one that OpenTelemetry's variables name."""
    came: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            came.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield came
    server.shutdown()


def test_spans_come_to_a_collector(collector: list[ExportTraceServiceRequest]) -> None:
    provider = TracerProvider()
    for processor in import_attr(traces.configured(TracesSection(share=1, export="otlp")).exporter_import_path)():
        provider.add_span_processor(processor)
    with provider.get_tracer("test").start_as_current_span("hear", attributes={"request_id": "7"}):
        pass
    provider.shutdown()
    [span] = [span for r in collector for part in r.resource_spans for s in part.scope_spans for span in s.spans]
    assert span.name == "hear" and span.attributes[0].value.string_value == "7"


def test_nothing_is_traced_unless_asked() -> None:
    assert not traces.configured(TracesSection()).enabled
    assert proxies.TRACE_SHARE_VARIABLE not in proxies.environment(ServingSection())


def test_proxies_and_replicas_write_the_same_files() -> None:
    section = TracesSection(share=0.25)
    path = traces.configured(section).exporter_import_path
    assert import_attr(path) is tracing_utils.default_tracing_exporter
    told = proxies.environment(ServingSection(traces=section))
    assert told["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] == path
    assert told["RAY_SERVE_TRACING_SAMPLING_RATIO"] == told[proxies.TRACE_SHARE_VARIABLE] == "0.25"


def test_a_missing_exporter_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen = recipe.load("tiny", ("serving.traces={share: 0.1, export: otlp}",))
    with pytest.raises(ServeError, match=r"pip install 'speechgpt-ray\[otlp\]'"):
        start(None, chosen)  # type: ignore[arg-type]
