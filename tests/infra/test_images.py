"""The image definition, as far as it can be checked without Docker: what it copies, pins and runs as."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from speechgpt.runtime.manifests import USER_ID

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/images/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments), continued lines joined, comments gone."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def copied() -> list[str]:
    """What the build takes from the repository."""
    found: list[str] = []
    for word, arguments in instructions():
        if word == "COPY" and not arguments.startswith("--from"):
            found += arguments.split()[:-1]
    return found


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    patterns = (ROOT / "infra/images/Dockerfile.dockerignore").read_text().splitlines()
    assert patterns[1] == "*", "the build must see nothing that is not named"
    admitted = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert set(copied()) == admitted
    for name in copied():
        assert (ROOT / name).exists(), f"the image copies {name}, which is not there"


def test_pins_are_the_constraints() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    steps = [arguments for word, arguments in instructions() if word == "RUN"]
    pinned = [pin for step in steps for pin in re.findall(r"([\w.-]+)==([\w.]+)", step)]
    assert pinned
    for name, version in pinned:
        assert constraints[name] == version
    for step in (step for step in steps if "uv pip install" in step):
        assert "--constraint constraints.txt" in step or "--no-deps" in step


def test_base_images_are_pinned() -> None:
    defaults = dict(arguments.split("=", 1) for word, arguments in instructions() if word == "ARG")
    for image in (arguments.split()[0] for word, arguments in instructions() if word == "FROM"):
        named = re.sub(r"\$\{(\w+)\}", lambda variable: defaults[variable[1]], image)
        assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", named)


def test_it_runs_as_the_user_that_the_manifests_name() -> None:
    words = instructions()
    last_stage = max(place for place, (word, _) in enumerate(words) if word == "FROM")
    users = [arguments for word, arguments in words[last_stage:] if word == "USER"]
    assert users == [str(USER_ID)]
    assert any(f"useradd --uid {USER_ID} " in arguments for word, arguments in words[last_stage:] if word == "RUN")


def test_no_secret_is_baked_in() -> None:
    for word, arguments in instructions():
        if word in ("ENV", "ARG"):
            assert not re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\w*=", arguments)


@pytest.mark.slow
def test_the_package_builds_from_what_is_copied(tmp_path: Path) -> None:
    """The image's last build step, from a directory that holds what the image copies and nothing else."""
    source = tmp_path / "source"
    for name in copied():
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, place)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"speechgpt/cli.py", "jobs/pipeline.py", "serve/app.py", "speechgpt/recipes/nano.yaml"} <= names
