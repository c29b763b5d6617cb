"""The `speechgpt` command: quick, lazy, and honest about what it does not know."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from speechgpt import cli

HOUSE = Path(__file__).parents[2]
VERBS = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["entry-points"]["speechgpt.commands"]


def speechgpt(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "speechgpt.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", **environment})


def test_help_lists_every_verb_with_its_summary() -> None:
    shown = speechgpt("--help")
    assert shown.returncode == 0
    for name, target in VERBS.items():
        summary = cli.summary(EntryPoint(name, target, cli.GROUP))
        assert summary, f"{target} has no docstring"
        lines = [line for line in shown.stdout.splitlines() if f" {name} " in line]
        assert any(summary[:60] in line for line in lines), name


def test_help_imports_no_verb_and_nothing_heavy() -> None:
    """What makes `--help` answer at once; seconds would depend on the machine."""
    code = (
        "import sys; sys.argv = ['speechgpt', '--help']\nfrom speechgpt.cli import main\n"
        "try: main()\nfinally: print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "speechgpt.cli" in modules
    heavy = {"torch", "ray", "mlflow", "transformers", "pyarrow", "numpy", "pydantic", "boto3"}
    assert heavy.isdisjoint(modules)
    assert not any(name.startswith(("jobs.", "serve.")) for name in modules)


def test_summaries_come_from_function_then_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        '"""Job `x`: what the module does.\n\nMore."""\nraise ImportError\n'
        'def main():\n    """What it does.\n    """\ndef bare(): pass\n'
    )
    (tmp_path / "lazy_verb.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.summary(EntryPoint("x", "lazy_verb:main", cli.GROUP)) == "What it does"
    assert cli.summary(EntryPoint("x", "lazy_verb:bare", cli.GROUP)) == "What the module does"
    assert cli.summary(EntryPoint("x", "no_such_module:main", cli.GROUP)) == ""


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_explains_itself(name: str) -> None:
    shown = speechgpt(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"speechgpt {name}" in shown.stdout


def test_unknown_verb_is_wrong_usage_and_a_near_one_is_suggested() -> None:
    done = speechgpt("manifst")
    assert done.returncode == 2
    assert "manifest" in done.stderr


def test_no_verb_shows_help_and_is_wrong_usage() -> None:
    done = speechgpt()
    assert done.returncode == 2
    assert "tokenize" in done.stdout + done.stderr


def test_doctor_as_json() -> None:
    done = speechgpt("doctor", "--json")
    answer = json.loads(done.stdout)
    findings = {finding["subject"]: finding for finding in answer["findings"]}
    assert answer["healthy"] == (done.returncode == 0) == all(f["grade"] != "missing" for f in findings.values())
    assert {"python", "CPU cores", "memory", "workspace", "Ray cluster", "tracking", "serving port"} <= set(findings)
    assert all(finding["remedy"] for finding in findings.values() if finding["grade"] != "ok")


@pytest.mark.parametrize(
    ("subject", "environment"),
    [
        ("Ray cluster", {"RAY_ADDRESS": "127.0.0.1:1"}),
        ("tracking", {"MLFLOW_TRACKING_URI": "http://user:secret@127.0.0.1:1"}),
    ],
)
def test_doctor_names_what_is_missing(subject: str, environment: dict[str, str]) -> None:
    done = speechgpt("doctor", "--json", **environment)
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert findings[subject]["grade"] == "missing"
    assert findings[subject]["remedy"]
    assert "secret" not in done.stdout


def test_doctor_looks_at_the_bucket(s3_bucket: str) -> None:
    for bucket, grade in ((s3_bucket, "ok"), ("no-such-bucket", "missing")):
        done = speechgpt("doctor", "--json", "--workspace", f"s3://{bucket}/run")
        findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert findings["workspace"]["grade"] == grade


def test_doctor_is_a_table_for_people() -> None:
    done = speechgpt("doctor")
    assert "python" in done.stdout
    assert "to do" in done.stdout
