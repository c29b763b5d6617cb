"""The wheel holds everything, installs into an empty environment, and answers there."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git would hand to a newcomer, so that nothing untracked makes it work."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (HOUSE / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((HOUSE / name).read_bytes())
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(words, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "-z", "platform/speechgpt", "jobs", "serve"], cwd=HOUSE, capture_output=True, check=True
    )
    names = [name for name in listed.stdout.decode().split("\0") if name and (HOUSE / name).is_file()]
    assert len(names) > 50
    missing = [name for name in names if name.removeprefix("platform/") not in inside]
    assert missing == [], "add them to [tool.setuptools.package-data]"
    assert not any(name.startswith(("platform/", "tests/")) for name in inside)


def test_it_answers_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    words = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    words += ["--constraints", str(HOUSE / "constraints.txt"), "--overrides", str(_overrides(tmp_path)), str(wheel)]
    subprocess.run(words, check=True, env={**os.environ, **_find_links()})
    command = python.with_name("speechgpt")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0
    assert "train-vocoder" in shown.stdout
    examined = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(examined.stdout)["healthy"], examined.stdout
    recipes = [python, "-c", "from speechgpt import recipe; [recipe.load(name) for name in recipe.shipped()]"]
    subprocess.run(recipes, check=True, cwd=tmp_path)


def _overrides(folder: Path) -> Path:
    """Outside the repository uv does not see the overrides of pyproject.toml."""
    import tomllib

    tool = tomllib.loads((HOUSE / "pyproject.toml").read_text())["tool"]
    (folder / "overrides.txt").write_text("\n".join(tool["uv"]["override-dependencies"]))
    return folder / "overrides.txt"


def _find_links() -> dict[str, str]:
    """As the Makefile does: the folder of wheels that pip is configured with, if it exists."""
    configured = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    match = re.search(r"find-links='(.*)'", configured)
    return {"UV_FIND_LINKS": match[1]} if match and Path(match[1]).is_dir() else {}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_constraints_are_names_and_versions_only(file: str) -> None:
    lines = (HOUSE / file).read_text().split()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
