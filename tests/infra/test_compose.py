"""The compose file, as far as it can be checked without a Docker daemon."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STACK = ROOT / "infra/stack"


def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((STACK / "compose.yaml").read_text())["services"])


def test_everything_is_published_on_loopback_alone() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned() -> None:
    for name, service in services().items():
        image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"])
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image), name


def test_secrets_come_from_the_environment_and_are_demanded() -> None:
    demanded: set[str] = set()
    for service in services().values():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY_ID", variable):
                found = re.fullmatch(r"\$\{(\w+):\?.+\}", value)
                assert found, variable
                demanded.add(found[1])
    example = dict(line.split("=", 1) for line in (STACK / "environment.example").read_text().splitlines()[1:])
    assert set(example) == demanded
    assert not any(example.values()), "a password that everybody has"


def test_roles_and_program_are_those_of_the_image() -> None:
    entrypoint = (ROOT / "infra/images/entrypoint").read_text()
    assert f"\n{services()['tracking']['command'][0]})\n" in entrypoint
    _, _, program = services()["buckets"]["command"]
    compile(program, "buckets", "exec")


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here: that it accepts the file was not tried")
    shutil.copy(STACK / "compose.yaml", tmp_path)
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=a\nAWS_ACCESS_KEY_ID=b\nAWS_SECRET_ACCESS_KEY=c\n")
    command = [docker, "compose", "--project-directory", str(tmp_path), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
