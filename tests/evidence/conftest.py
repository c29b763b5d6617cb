"""Long proofs. Whatever stands here carries the marker `evidence`, and what it finds is written down in reports/.

A proof states its claim in its docstring and its figures with pytest's own `record_property(name, value)`.
"""

import json
import os
import platform
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

REPORTS = Path(__file__).parents[2] / "reports"

_proofs: list[dict[str, Any]] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.evidence)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.failed:
        function = getattr(item, "function", None)
        claim = (function.__doc__ or item.name).partition("\n\n")[0]
        _proofs.append(
            {
                "proof": item.nodeid,
                "claim": " ".join(claim.split()),
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                "figures": dict(item.user_properties),
            }
        )
    return report


def pytest_sessionfinish() -> None:
    if not _proofs:
        return
    conditions = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
    }
    REPORTS.mkdir(exist_ok=True)
    report = {"conditions": conditions, "proofs": _proofs}
    (REPORTS / "evidence.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    (REPORTS / "evidence.md").write_text(_page(conditions))


def _page(conditions: dict[str, Any]) -> str:
    lines = ["# Evidence", "", ", ".join(f"{name} {value}" for name, value in conditions.items()), ""]
    for proof in _proofs:
        lines += [f"## {proof['outcome']}: {proof['claim']}", "", f"`{proof['proof']}`, {proof['seconds']} s", ""]
        lines += [f"- {name}: {value}" for name, value in proof["figures"].items()] + [""]
    return "\n".join(lines)
