"""The house keeps to its plan: names, import layers, nothing that shadows the standard library."""

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "base"}


def _sources() -> list[Path]:
    folders = ("platform", "jobs", "serve", "tests", "infra")
    return [file for folder in folders for file in (HOUSE / folder).rglob("*.py")]


def test_platform_is_no_package() -> None:
    """With an __init__.py it would shadow the standard library's `platform` in every process that has the repository on
    its path, Ray's workers among them."""
    assert (HOUSE / "platform" / "speechgpt" / "__init__.py").is_file()
    assert not (HOUSE / "platform" / "__init__.py").exists()
    code = "import platform; platform.python_version(); print(platform.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True).stdout
    assert not Path(found.strip()).is_relative_to(HOUSE)


def test_tests_are_no_packages() -> None:
    assert list((HOUSE / "tests").rglob("__init__.py")) == []


def test_no_script_is_named_like_the_standard_library() -> None:
    """The folder of a script is first on its path: `jobs/tokenize.py` would break `inspect` in `python jobs/…`. Inside
    `speechgpt` nothing is run as a script."""
    scripts = [file for file in _sources() if not file.is_relative_to(HOUSE / "platform")]
    assert [file for file in scripts if file.stem in sys.stdlib_module_names] == []


def test_names_say_what_is_inside() -> None:
    assert [file for file in _sources() if file.stem in VAGUE] == []


def _lint(tmp_path: Path, folder: str, code: str) -> str:
    file = tmp_path / folder / "example.py"
    file.parent.mkdir(parents=True)
    file.write_text(code)
    # The per-file exceptions are relative to the configuration's own folder.
    (tmp_path / "pyproject.toml").write_text((HOUSE / "pyproject.toml").read_text())
    words = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise", str(file)]
    return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path).stdout


@pytest.mark.parametrize("module", ["ray.data", "ray.train", "ray.serve", "pickle"])
def test_the_library_may_not_import(tmp_path: Path, module: str) -> None:
    assert "TID251" in _lint(tmp_path, "platform/speechgpt/speech", f"import {module}\n")
    assert "TID251" in _lint(tmp_path / "from", "platform/speechgpt/speech", f"from {module} import x\n")


def test_jobs_may_import_ray(tmp_path: Path) -> None:
    assert "TID251" not in _lint(tmp_path, "jobs", "import ray.data\n")


def test_imports_point_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
