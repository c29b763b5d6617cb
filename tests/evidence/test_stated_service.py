"""A service that a rendered Serve config states, as `serve deploy` and KubeRay deploy it: its bundle is exchanged while
it serves, and neither the same config once more nor a new controller takes that back."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bundle_variants
import httpx
import pytest
import yaml
from fixtures_of import fixtures_of
from live_service import alive_actors, session_directory, until
from no_registry import NoRegistry
from promotion_load import Load, load
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from typer.testing import CliRunner

from jobs import cluster
from serve import promote, records
from serve.verdict import Terms
from speechgpt.recipe import Recipe
from speechgpt.runtime import bundle, proxies
from speechgpt.runtime.config import TracesSection
from speechgpt.runtime.manifests import STATED

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.evidence, pytest.mark.timeout(3600)]


_serve = fixtures_of("serve")
tiny, tiny_bundle = _serve.tiny, _serve.tiny_bundle


@dataclass
class Stated:
    url: str
    dashboard: ServeSubmissionClient
    config: dict[str, Any]

    def deploy(self, *applications: str) -> None:
        """As `serve deploy` does, and KubeRay; all that the config states, or only these."""
        stated = [app for app in self.config["applications"] if not applications or app["name"] in applications]
        self.dashboard.deploy_applications({**self.config, "applications": stated})

    def status(self, source: str = "") -> dict[str, str]:
        """Of each application; with source `declarative`, what KubeRay sees."""
        query = f"?api_type={source}" if source else ""
        found = self.dashboard._do_request("GET", f"/api/serve/applications/{query}").json()
        return {name: app["status"] for name, app in found["applications"].items()}

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.url}/readyz", timeout=60)


@pytest.fixture(scope="module")
def service(tiny: Recipe, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stated]:
    """What the AWS target renders, on a cluster whose nodes have the environment that it gives them."""
    import ray
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gateway = tiny.serving.gateway.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    changed = {"port": port, "gateway": gateway, "request_timeout_seconds": 180.0, "traces": TracesSection(share=1)}
    serving = tiny.serving.model_copy(update=changed)
    directory = tmp_path_factory.mktemp("stated")
    (directory / "mine.yaml").write_text(tiny.model_copy(update={"serving": serving}).yaml())
    words = ["render", "--recipe", str(directory / "mine.yaml"), "--target", "aws", "--output", str(directory / "aws")]
    done = CliRunner().invoke(cluster.main, words)
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((directory / "aws/serve.yaml").read_text())
    for application in config["applications"]:
        application["args"] = {"bundle": str(tiny_bundle), "recipe": str(directory / "mine.yaml")}
    config["http_options"]["host"] = "127.0.0.1"

    # An application that is deployed over HTTP knows nothing of this process.
    told = {**proxies.environment(serving), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        context = ray.init(address="local", num_cpus=8, object_store_memory=250 << 20, include_dashboard=True)
        dashboard = ServeSubmissionClient(f"http://{context.address_info['webui_url']}")
        yield Stated(f"http://127.0.0.1:{port}", dashboard, config)
        serve.shutdown()
        ray.shutdown()


def gateway_replicas() -> set[str]:
    return {actor.name for actor in alive_actors() if f"#{records.GATEWAY}#" in (actor.name or "")}


def replicas_of(application: str) -> int:
    deployments = records.details()["applications"][application]["deployments"]
    return sum(len(deployment["replicas"]) for deployment in deployments.values())


def all_by(seen: Load, *digests: str) -> None:
    assert seen.failed == [] and seen.requests
    assert {request.bundle for request in seen.requests} == {*digests}


def test_what_is_stated_comes_up_in_any_order_and_its_bundle_is_exchanged_under_load(
    service: Stated, tiny_bundle: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A service deployed from a rendered Serve config: no request fails while its bundle is exchanged, while the same
    config is deployed once more, and while Serve's controller is killed; the promoted bundle serves on."""
    import ray

    old = bundle.load(tiny_bundle).digest
    service.deploy("gateway")
    assert until(lambda: service.status().get("gateway") == "RUNNING", 600), service.status()
    waiting = service.ready()
    assert (waiting.status_code, waiting.json()["waiting_for"]) == (503, [STATED])
    replicas = gateway_replicas()
    service.deploy()
    assert until(lambda: service.ready().status_code == 200, 600), service.ready().text
    assert until(lambda: service.status("declarative") == {"gateway": "RUNNING", STATED: "RUNNING"}, 60)
    assert gateway_replicas() == replicas, "it picked the bundle up by itself"

    directory = bundle_variants.remade(tiny_bundle, tmp_path / "tiny", bundle_variants.voice(7))
    new = bundle.load(directory).digest
    terms = Terms(share=0.3, watch_seconds=10, requests=12, patience_seconds=900)
    with load(service.url) as seen:
        promote.roll_out(str(directory), "", NoRegistry(), terms, 900, print)
        after = time.monotonic()
        time.sleep(5)
    all_by(seen, old, new)
    assert {request.bundle for request in seen.requests if request.began > after} == {new}
    assert gateway_replicas() == replicas, "the gateway was not restarted"
    assert service.status() == {"gateway": "RUNNING", f"bundle-{new[:12]}": "RUNNING"}
    assert service.status("declarative") == {"gateway": "RUNNING"}, "KubeRay would deploy all anew if it saw nothing"
    record_property("requests while it was promoted", len(seen.requests))

    with load(service.url) as seen:
        service.deploy()
        assert until(lambda: service.status().get(STATED) == "RUNNING", 300), service.status()
        time.sleep(5)
    all_by(seen, new)
    assert replicas_of(STATED) == 0, "it takes nothing from the one that was promoted"
    record_property("requests while the config was deployed once more", len(seen.requests))

    with load(service.url) as seen:
        ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
        time.sleep(5)
        assert until(lambda: set(service.status().values()) == {"RUNNING"}, 300), service.status()
        time.sleep(5)
    all_by(seen, new)
    assert gateway_replicas() == replicas
    record_property("requests while the controller was away", len(seen.requests))

    with load(service.url) as seen:
        promote.roll_out(str(tiny_bundle), "", NoRegistry(), terms, 900, print)
    all_by(seen, new, old)
    assert service.status() == {"gateway": "RUNNING", f"bundle-{old[:12]}": "RUNNING"}
    assert promote.state()["serving"] == old and gateway_replicas() == replicas
    assert service.ready().status_code == 200


def test_traces_that_the_recipe_asks_for_are_made(service: Stated) -> None:
    """By the proxy, the gateway and the bundle, as under `speechgpt serve`."""
    written = {file.name for file in (session_directory() / "logs/serve/spans").iterdir() if file.stat().st_size}
    for part in ("proxy", "Gateway", "LanguageModel", "Vocoder"):
        assert any(part in name for name in written), (part, written)
