"""The code that travels with a submitted job."""

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from speechgpt.runtime.code_archive import write_code_archive

PACKAGES, DISTRIBUTION = ("speechgpt", "jobs", "serve"), "speechgpt-ray"


def archive(path: Path, extra: dict[str, bytes] | None = None) -> Path:
    write_code_archive(path, PACKAGES, DISTRIBUTION, extra or {})
    return path


def test_it_holds_code_data_and_entry_points_and_nothing_else(tmp_path: Path) -> None:
    names = zipfile.ZipFile(archive(tmp_path / "code.zip", {"recipe.yaml": b"name: mine"})).namelist()
    assert {"speechgpt/recipes/tiny.yaml", "jobs/pipeline.py", "serve/app.py", "recipe.yaml"} <= set(names)
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, "recipe.yaml"}
    assert not [name for name in names if "__pycache__" in name]


def test_equal_code_makes_equal_bytes(tmp_path: Path) -> None:
    first, second = archive(tmp_path / "1.zip").read_bytes(), archive(tmp_path / "2.zip").read_bytes()
    assert first == second
    assert archive(tmp_path / "3.zip", {"recipe.yaml": b"name: mine"}).read_bytes() != first


def test_it_comes_before_another_version_that_a_node_has(tmp_path: Path) -> None:
    """Modules and verbs are those that were sent, though the node has an older package under the same name."""
    with zipfile.ZipFile(archive(tmp_path / "code.zip")) as code:
        code.extractall(tmp_path / "sent")
    older = tmp_path / "node"
    (older / "speechgpt").mkdir(parents=True)
    (older / "speechgpt" / "__init__.py").write_text("__version__ = 'older'")
    (older / "speechgpt_ray-0.0.1.dist-info").mkdir()
    (older / "speechgpt_ray-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: speechgpt-ray\nVersion: 0.0.1"
    )
    (older / "speechgpt_ray-0.0.1.dist-info" / "entry_points.txt").write_text(
        "[speechgpt.commands]\ngone = gone:main\n"
    )
    program = """
import importlib.metadata, jobs, speechgpt
print(speechgpt.__file__, jobs.__file__, importlib.metadata.version("speechgpt-ray"))
print(*(entry.name for entry in importlib.metadata.entry_points(group="speechgpt.commands")))
"""
    path = os.pathsep.join([str(tmp_path / "sent"), str(older)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    module, jobs, version, *verbs = done.stdout.split()
    assert Path(module).is_relative_to(tmp_path / "sent")
    assert Path(jobs).is_relative_to(tmp_path / "sent")
    assert version == metadata.version(DISTRIBUTION)
    assert "pipeline" in verbs
    assert "gone" not in verbs


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        write_code_archive(tmp_path / "code.zip", ["no_such_package"], DISTRIBUTION, {})
