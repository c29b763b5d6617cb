"""The README's first command, as somebody types it who has just cloned the repository."""

import json
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECOGNITION_BAR = 0.20
MINUTES_BAR = 20

pytestmark = [pytest.mark.evidence, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(7200)]


def make_demo(clone: Path) -> float:
    """Runs it; gives its seconds."""
    began = time.monotonic()
    done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return time.monotonic() - began


def test_from_a_fresh_clone_the_demo_reaches_its_bars_and_redoes_nothing(tmp_path: Path, record_property) -> None:
    """A fresh clone's `make demo`, install included, ends within 20 minutes, hears seen voices with a WER of at most
    0.20 and answers in well-formed replies only; run again it redoes no finished job."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    seconds = make_demo(clone)
    reports, markers = clone / "runs/nano/reports", sorted((clone / "runs/nano").glob("*/_done/*.json"))
    figures = json.loads((reports / "evaluation.json").read_text())
    costs = json.loads((reports / "costs.json").read_text())
    record_property("minutes, install included", round(seconds / 60, 1))
    record_property("CPU-minutes", round(sum(cost["cpu"] for cost in costs.values()) / 60, 1))
    for name, value in figures.items():
        if name != "detail":
            record_property(name, value)
    for group, scores in figures["detail"]["groups"].items():
        record_property(f"recognition_wer, {group}", scores["recognition_wer"])
    made = {marker: marker.stat().st_mtime_ns for marker in markers}
    record_property("minutes, second run", round(make_demo(clone) / 60, 1))
    assert {marker: marker.stat().st_mtime_ns for marker in markers} == made, "a finished job was done again"
    assert figures["format_validity"] == 1.0
    assert figures["recognition_wer"] <= RECOGNITION_BAR
    assert seconds <= MINUTES_BAR * 60
