"""Where the OpenTelemetry spans of requests go. Ray Serve makes them, in its proxies and in each deployment's replicas,
with `request_id` on each; they hold nothing of what was said."""

import importlib.util
from typing import TYPE_CHECKING

from speechgpt.runtime import proxies
from speechgpt.runtime.config import TracesSection

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from ray.serve.schema import TracingConfig


class ExporterMissingError(RuntimeError):
    """The OTLP exporter is not installed; the message says how to get it."""


def configured(section: TracesSection) -> "TracingConfig":
    """As `serve.start` takes it. Raises ExporterMissingError."""
    from ray.serve.schema import TracingConfig

    if section.export == "otlp" and section.share and not _has_exporter():
        raise ExporterMissingError(
            "serving.traces.export is otlp, whose exporter is not installed: pip install 'speechgpt-ray[otlp]'"
        )
    path = proxies.exporter(section)
    return TracingConfig(enabled=section.share > 0, exporter_import_path=path, sampling_ratio=section.share)


def to_collector() -> "list[SpanProcessor]":
    """To the collector that OTEL_EXPORTER_OTLP_ENDPOINT and its like name, on the node where this runs: they may hold
    a key, which a runtime environment must not."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _has_exporter() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False
