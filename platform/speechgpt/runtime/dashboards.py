"""What is watched: Prometheus' configuration and alert rules, and Grafana dashboards, made from Ray's own metrics and
those of `serve/meters.py`.

Ray exports all of it (Serve's, Train's and Data's too) on every node. The tests hold every name here against what is
really exported.
"""

from dataclasses import dataclass
from typing import Any

_RATE = "[5m]"
_ERROR_SHARE = (
    f"sum(rate(ray_serve_num_http_error_requests_total{{error_code=~'5..'}}{_RATE}))"
    f" / sum(rate(ray_serve_num_http_requests_total{_RATE}))"
)
_OBJECT_STORE = (
    'sum(ray_object_store_memory) by (instance) / sum(ray_resources{Name="object_store_memory"}) by (instance)'
)
_DEPLOYMENT_LATENCY = (
    f"histogram_quantile(0.95, sum(rate(ray_serve_deployment_processing_latency_ms_bucket{_RATE})) by (deployment, le))"
)
_DISK = "ray_node_disk_free / (ray_node_disk_free + ray_node_disk_usage)"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it."""
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)"""


@dataclass(frozen=True)
class Alert:
    name: str
    expression: str
    minutes: int
    severity: str
    summary: str
    remedy: str
    """A page of infra/README.md."""


def _panel(title: str, unit: str, *queries: tuple[str, str]) -> Panel:
    return Panel(title, unit, queries)


def _rate(metric: str, *labels: str) -> str:
    return f"sum(rate({metric}{_RATE})) by ({', '.join(labels)})"


def _http_latency(quantile: float) -> str:
    buckets = f"sum(rate(ray_serve_http_request_latency_ms_bucket{{route!~'/-/.*'}}{_RATE})) by (le)"
    return f"histogram_quantile({quantile}, {buckets})"


def _quantile(quantile: float, buckets: str, *labels: str) -> str:
    return f"histogram_quantile({quantile}, {_rate(buckets, *labels, 'le')})"


def _first_sound(quantile: float) -> str:
    return _quantile(quantile, "ray_speechgpt_time_to_first_audio_seconds_bucket{kind='streamed'}")


_MEMORY = _panel("Memory", "percentunit", ("ray_node_mem_used / ray_node_mem_total", "{{instance}}"))
_GPU = _panel("GPU", "percent", ("avg(ray_node_gpus_utilization) by (instance)", "{{instance}}"))
_RUN = "{{ray_train_run_name}}"

JOBS = (
    _panel(
        "Nodes",
        "short",
        ("sum(ray_cluster_active_nodes) by (node_type)", "{{node_type}} active"),
        ("sum(ray_cluster_pending_nodes) by (node_type)", "{{node_type}} pending"),
        ("sum(ray_cluster_failed_nodes) by (node_type)", "{{node_type}} failed"),
    ),
    _panel("Tasks", "short", ("sum(ray_tasks) by (State)", "{{State}}")),
    _panel("CPUs", "short", ('sum(ray_resources{Name="CPU"}) by (State)', "{{State}}")),
    _panel("GPUs", "short", ('sum(ray_resources{Name="GPU"}) by (State)', "{{State}}")),
    _panel("Rows made", "rowsps", (_rate("ray_data_output_rows", "dataset"), "{{dataset}}")),
    _panel("Object store", "percentunit", (_OBJECT_STORE, "{{instance}}")),
    _MEMORY,
    _panel("Disk free", "percentunit", (_DISK, "{{instance}}")),
)

TRAINING = (
    _panel(
        "State of each run",
        "short",
        (
            "sum(ray_train_controller_state) by (ray_train_run_name, ray_train_controller_state)",
            _RUN + " {{ray_train_controller_state}}",
        ),
    ),
    _GPU,
    _panel("GPU memory", "decmbytes", ("sum(ray_node_gram_used) by (instance)", "{{instance}}")),
    _panel("CPU", "percent", ("ray_node_cpu_utilization", "{{instance}}")),
    _panel(
        "Seconds in starting workers",
        "s",
        ("sum(ray_train_worker_group_start_total_time_s) by (ray_train_run_name)", _RUN),
    ),
    _panel(
        "Seconds that workers waited in report()",
        "s",
        ("max(ray_train_report_total_blocked_time_s) by (ray_train_run_name)", _RUN),
    ),
    _panel(
        "Network",
        "Bps",
        ("ray_node_network_receive_speed", "{{instance}} in"),
        ("ray_node_network_send_speed", "{{instance}} out"),
    ),
    _MEMORY,
)

SERVING = (
    _panel("Requests", "reqps", (_rate("ray_serve_num_http_requests_total{route!~'/-/.*'}", "route"), "{{route}}")),
    _panel("Errors", "reqps", (_rate("ray_serve_num_http_error_requests_total", "error_code"), "{{error_code}}")),
    _panel(
        "Time to the end of a reply",
        "ms",
        (_http_latency(0.5), "p50"),
        (_http_latency(0.95), "p95"),
        (_http_latency(0.99), "p99"),
    ),
    _panel("p95 in each deployment", "ms", (_DEPLOYMENT_LATENCY, "{{deployment}}")),
    _panel("First sound of streamed answers", "s", *((_first_sound(q), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99))),
    _panel(
        "Seconds of work for one of sound",
        "short",
        (_quantile(0.5, "ray_speechgpt_realtime_factor_bucket"), "p50"),
        (_quantile(0.95, "ray_speechgpt_realtime_factor_bucket"), "p95"),
    ),
    _panel("p95 of each stage", "s", (_quantile(0.95, "ray_speechgpt_stage_seconds_bucket", "stage"), "{{stage}}")),
    _panel(
        "Turned away and broken off",
        "reqps",
        (_rate("ray_speechgpt_rejected_total", "reason"), "{{reason}}"),
        (_rate("ray_speechgpt_cancelled_total", "reason"), "{{reason}}"),
    ),
    _panel(
        "Sound made, and pieces that came late",
        "short",
        (f"sum(rate(ray_speechgpt_audio_seconds_generated_total{_RATE}))", "seconds a second"),
        (f"sum(rate(ray_speechgpt_stream_underruns_total{_RATE}))", "late pieces a second"),
    ),
    _panel("Realtime sessions", "short", ("sum(ray_speechgpt_active_sessions)", "open")),
    _panel(
        "Healthy replicas",
        "short",
        ("sum(ray_serve_deployment_replica_healthy) by (deployment)", "{{deployment}}"),
    ),
    _panel("In work", "short", ("sum(ray_serve_replica_processing_queries) by (deployment)", "{{deployment}}")),
    _panel("Waiting", "short", ("sum(ray_serve_deployment_queued_queries) by (deployment)", "{{deployment}}")),
    _GPU,
)

DASHBOARDS = {"jobs": JOBS, "training": TRAINING, "serving": SERVING}

ALERTS = (
    Alert("NodeOutOfSight", 'up{job="ray"} == 0', 5, "warning",
          "{{ $labels.instance }} exports nothing", "a node is gone"),
    Alert("HeadOutOfSight", 'absent(ray_cluster_active_nodes)', 5, "critical",
          "no head tells of its nodes", "the head is gone"),
    Alert("NoHealthyReplica", "sum(ray_serve_deployment_replica_healthy) by (deployment) == 0", 2, "critical",
          "{{ $labels.deployment }} has no healthy replica", "the service does not answer"),
    Alert("ManyErrors", f"{_ERROR_SHARE} > 0.05", 5, "critical",
          "more than 5 % of requests end with 5xx", "the service does not answer"),
    Alert("SlowReplies", f"{_http_latency(0.95)} > 30000", 10, "warning",
          "one reply in twenty takes more than 30 s", "the service is slow"),
    Alert("RequestsWait", "sum(ray_serve_deployment_queued_queries) by (deployment) > 32", 5, "warning",
          "requests wait for {{ $labels.deployment }}", "the service is slow"),
    Alert("DiskAlmostFull", f"{_DISK} < 0.1", 10, "warning",
          "{{ $labels.instance }} has less than 10 % of its disk", "a disk is full"),
    Alert("ObjectStoreFull", f"{_OBJECT_STORE} > 0.9", 10, "warning",
          "{{ $labels.instance }} spills objects to disk", "the object store is full"),
    Alert("MemoryAlmostGone", "ray_node_mem_used / ray_node_mem_total > 0.95", 5, "warning",
          "{{ $labels.instance }} is about to kill workers", "a worker was killed for memory"),
    Alert("NodesCannotBeHad", "sum(ray_cluster_failed_nodes) by (node_type) > 0", 15, "warning",
          "the cloud gives no {{ $labels.node_type }}", "nodes cannot be had"),
)  # fmt: skip


def prometheus() -> dict[str, Any]:
    """Prometheus' own configuration. Nodes come and go: Ray's head keeps a list of them in a file, which Prometheus
    reads where it runs on the head; on Kubernetes the pods are found by their labels instead."""
    pods = {
        "job_name": "ray-pods",
        "kubernetes_sd_configs": [{"role": "pod"}],
        "relabel_configs": [
            {
                "source_labels": ["__meta_kubernetes_pod_label_app_kubernetes_io_name"],
                "regex": "speechgpt",
                "action": "keep",
            },
            {
                "source_labels": ["__meta_kubernetes_pod_container_port_name"],
                "regex": "metrics",
                "action": "keep",
            },
            # Alerts speak of one job, wherever it runs.
            {"target_label": "job", "replacement": "ray"},
        ],
    }
    head = [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": head}, pods],
    }


def alert_rules() -> dict[str, Any]:
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": f"{alert.minutes}m",
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "page": f"infra/README.md, {alert.remedy}"},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "speechgpt", "rules": rules}]}


def grafana(name: str) -> dict[str, Any]:
    """The dashboard of `jobs`, `training` or `serving`, as Grafana imports it."""
    panels = []
    for place, panel in enumerate(DASHBOARDS[name]):
        targets = [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ]
        panels.append(
            {
                "id": place + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": {"type": "prometheus", "uid": "${source}"},
                "gridPos": {"h": 8, "w": 12, "x": 12 * (place % 2), "y": 8 * (place // 2)},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": targets,
            }
        )
    return {
        "uid": f"speechgpt-{name}",
        "title": f"SpeechGPT: {name}",
        "tags": ["speechgpt"],
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "schemaVersion": 39,
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "links": [
            # Ray writes dashboards of its own, which Grafana finds by this tag where they are provisioned, too.
            {"type": "dashboards", "title": "Ray", "tags": ["ray"], "asDropdown": True},
            {"type": "dashboards", "title": "SpeechGPT", "tags": ["speechgpt"], "asDropdown": True},
        ],
        "panels": panels,
    }
