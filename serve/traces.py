"""Where the OpenTelemetry spans of requests go. Ray Serve makes them, in its proxies and in each deployment's replicas,
with `request_id` on each; they hold nothing of what was said."""

import importlib.util
from typing import TYPE_CHECKING

from serve.edge import TRACE_SHARE_VARIABLE
from speechgpt.runtime.config import TracesSection

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from ray.serve.schema import TracingConfig


class ExporterMissingError(RuntimeError):
    """The OTLP exporter is not installed; the message says how to get it."""


_FILES = "ray.serve._private.tracing_utils:default_tracing_exporter"
"""What Ray takes where nothing else is named."""


def configured(section: TracesSection) -> "TracingConfig":
    """As `serve.start` takes it. Raises ExporterMissingError."""
    from ray.serve.schema import TracingConfig

    if section.export == "otlp" and section.share and not _has_exporter():
        raise ExporterMissingError(
            "serving.traces.export is otlp, whose exporter is not installed: pip install 'speechgpt-ray[otlp]'"
        )
    return TracingConfig(enabled=section.share > 0, exporter_import_path=_path(section), sampling_ratio=section.share)


def environment(section: TracesSection) -> dict[str, str]:
    """Of Ray's proxies, which are told of no configuration."""
    if not section.share:
        return {}
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": _path(section),
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(section.share),
        TRACE_SHARE_VARIABLE: str(section.share),
    }


def _path(section: TracesSection) -> str:
    return f"{__name__}:{to_collector.__name__}" if section.export == "otlp" else _FILES


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
