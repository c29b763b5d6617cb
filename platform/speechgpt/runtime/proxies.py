"""What Ray Serve's proxies must be told by their environment, because no recipe reaches them.

`speechgpt serve` gives it to the controller that starts them, a rendered cluster has it on every node. Code of `serve`
is named here and not imported: it stands above this room.
"""

from speechgpt.runtime.config import ServingSection, TracesSection

MAX_BODY_VARIABLE, TRACE_SHARE_VARIABLE = "SPEECHGPT_MAX_BODY_BYTES", "SPEECHGPT_TRACE_SHARE"
"""By which `serve.edge` knows `serving.max_body_bytes` and `serving.traces.share`."""
_FILES = "ray.serve._private.tracing_utils:default_tracing_exporter"
"""What Ray takes where nothing else is named."""


def environment(serving: ServingSection) -> dict[str, str]:
    told = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.edge:proxy_middlewares",
        # Three times so long may a proxy take to come up; Ray's 5 seconds are too few on a busy or cold machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        MAX_BODY_VARIABLE: str(serving.max_body_bytes),
    }
    if serving.traces.share:
        told |= {
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": exporter(serving.traces),
            "RAY_SERVE_TRACING_SAMPLING_RATIO": str(serving.traces.share),
            TRACE_SHARE_VARIABLE: str(serving.traces.share),
        }
    return told


def exporter(section: TracesSection) -> str:
    """Where Ray finds what takes the spans: `module:function`."""
    return "serve.traces:to_collector" if section.export == "otlp" else _FILES
