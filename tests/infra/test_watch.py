"""What is watched exists: every metric that a panel or an alert names is one that Ray exports."""

import ast
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.cluster import main
from serve.meters import GATEWAY_METRICS, VOCODER_METRICS
from speechgpt.runtime import dashboards

ROOT = Path(__file__).parents[2]
WORDS = {"by", "on", "or", "and", "unless", "without", "ignoring", "le"}


def expressions() -> Iterator[str]:
    for panels in dashboards.DASHBOARDS.values():
        for panel in panels:
            yield from (expression for expression, _ in panel.queries)
    for alert in dashboards.ALERTS:
        yield alert.expression


def metrics_of(expression: str) -> set[str]:
    """Names of metrics in PromQL: identifiers that are no function, label or keyword."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on|without|ignoring)\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare)) - WORDS


def named_in_sources() -> set[str]:
    """Metrics that Ray's libraries and our service define and export once they are used: f-strings with each protocol
    filled in."""
    import ray

    root = Path(ray.__file__).parent
    found: set[str] = set()
    for pattern in ("serve/_private/**/*.py", "data/_internal/**/*.py", "train/v2/_internal/metrics/*.py"):
        for file in root.glob(pattern):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "http" for part in node.values]
                    found.add("".join(map(str, parts)))
    found |= {
        keyword.value.value
        for node in ast.walk(ast.parse((root / "dashboard/modules/reporter/reporter_agent.py").read_bytes()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Gauge"
        for keyword in [*(ast.keyword(value=a) for a in node.args[:1]), *node.keywords]
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str)
    }
    rays = {name for name in found if re.fullmatch(r"(serve|data|train|node|cluster|component)_\w+", name)}
    # Which these are a live page shows in tests/serve/test_service.py.
    return {f"ray_{name}" for name in (*rays, *GATEWAY_METRICS, *VOCODER_METRICS)}


def exported(name: str, known: set[str]) -> bool:
    """Prometheus' own endings: `_total` of counters, `_bucket`, `_sum` and `_count` of histograms."""
    return name == "up" or name in known or re.sub(r"_(total|bucket|sum|count)$", "", name) in known


@pytest.mark.ray
def test_every_metric_that_is_watched_is_one_that_ray_exports(ray_cluster: None) -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    libraries = named_in_sources()
    wanted = {name for expression in expressions() for name in metrics_of(expression)}
    core = {name for name in wanted if not exported(name, libraries)}
    assert {"ray_tasks", "ray_resources", "ray_object_store_memory"} >= core, "neither a library's nor the core's"
    deadline = time.monotonic() + 90
    while True:
        page = urllib.request.urlopen(url, timeout=20).read().decode()
        live = set(re.findall(r"^# TYPE (\S+)", page, flags=re.MULTILINE))
        if core <= live or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert core <= live


def test_the_test_itself_tells_a_name_that_nobody_exports() -> None:
    known = named_in_sources()
    assert metrics_of('sum(rate(ray_serve_nonsense_total{a="b"}[5m])) by (le) / ray_x') == {
        "ray_serve_nonsense_total",
        "ray_x",
    }
    assert not exported("ray_serve_nonsense_total", known)
    assert exported("ray_serve_num_http_requests_total", known)
    assert exported("ray_serve_http_request_latency_ms_bucket", known)


def test_every_expression_is_promql() -> None:
    promql = pytest.importorskip("promql_parser", reason="needs promql-parser")
    for expression in expressions():
        promql.parse(expression)
    with pytest.raises(ValueError):
        promql.parse("sum(rate(x[5m])")


def test_the_committed_files_are_what_the_code_gives(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["watch", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "infra/watch").iterdir()}
    assert made == committed, "out of date; run: speechgpt cluster watch --output infra/watch"


def test_every_alert_leads_to_a_page_of_the_handbook() -> None:
    handbook = (ROOT / "infra/README.md").read_text().lower()
    for alert in dashboards.ALERTS:
        assert f"### {alert.remedy}" in handbook, alert.name
    names = [
        rule["alert"] for rule in yaml.safe_load((ROOT / "infra/watch/alerts.yml").read_text())["groups"][0]["rules"]
    ]
    assert len(names) == len(set(names)) == len(dashboards.ALERTS)


def test_dashboards_have_what_grafana_needs() -> None:
    for name in dashboards.DASHBOARDS:
        board = json.loads((ROOT / f"infra/watch/{name}.json").read_text())
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places), "panels lie on each other"
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert board["templating"]["list"][0]["name"] == "source"
