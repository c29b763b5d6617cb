"""Where a service may listen, and what it is called."""

import socket
from pathlib import Path

import pytest

from serve.bundles import model_name
from serve.keys import KEY_VARIABLE, KEYS_VARIABLE
from serve.run import ServeError, check_address, has_keys
from serve.scaling import options
from speechgpt.runtime.config import DeploymentSection, ServingSection


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_strangers_need_a_key(host: str) -> None:
    with pytest.raises(ServeError, match=KEY_VARIABLE):
        check_address(host, free_port(), has_keys=False)


def test_loopback_and_keys_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (KEY_VARIABLE, KEYS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    check_address("localhost", free_port(), has_keys=has_keys(ServingSection()))
    assert not has_keys(ServingSection())
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    check_address("0.0.0.0", free_port(), has_keys=has_keys(ServingSection()))


def test_a_file_of_keys_that_is_wrong_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="speechgpt keys add"):
        has_keys(ServingSection(keys=str(tmp_path / "none.json")))
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys.json"))
    (tmp_path / "keys.json").write_text('{"format": 1, "keys": [{"id": "no"}]}')
    with pytest.raises(ServeError, match=r"keys\.json: keys\.0\.id"):
        has_keys(ServingSection())
    (tmp_path / "keys.json").write_text('{"format": 1, "keys": []}')
    assert has_keys(ServingSection())


def test_a_taken_port_is_not_shared() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ServeError, match="--port"):
            check_address("127.0.0.1", other.getsockname()[1], has_keys=False)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("nano", "nano"),
        ("/data/bundles/nano/", "nano"),
        ("s3://bucket/run/bundles/small", "small"),
        ("models:/speechgpt-nano@champion", "speechgpt-nano"),
        ("models:/speechgpt-nano/3", "speechgpt-nano"),
    ],
)
def test_model_names(address: str, name: str) -> None:
    assert model_name(address) == name


def test_a_section_becomes_deployment_options() -> None:
    section = DeploymentSection(min_replicas=2, max_replicas=5, cpus=2, gpus=0.5, max_queued_requests=9)
    chosen = options(section, ServingSection(retry_after_seconds=7))
    assert chosen["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}
    assert (chosen["autoscaling_config"].min_replicas, chosen["autoscaling_config"].max_replicas) == (2, 5)
    assert chosen["max_queued_requests"] == 9
    assert (chosen["backpressure_config"].status_code, chosen["backpressure_config"].retry_after_s) == (429, 7)
