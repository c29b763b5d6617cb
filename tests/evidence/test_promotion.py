"""Bundles that take each other's place in a real Ray Serve, while the official client asks without a pause.

Nothing here depends on how fast the machine is: each promotion waits for as many answers as it needs.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bundle_variants
import httpx
import pytest
from fixtures_of import fixtures_of
from live_service import alive_actors, until
from no_registry import NoRegistry
from promotion_load import Load, load

from serve import app, promote, run
from serve.bundles import find
from serve.promotion import PromotionError
from serve.records import GATEWAY
from serve.verdict import Terms
from speechgpt.recipe import Recipe
from speechgpt.runtime import bundle
from speechgpt.runtime.bundle import BundleError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.evidence, pytest.mark.timeout(3600)]


_serve = fixtures_of("serve")
tiny, tiny_bundle = _serve.tiny, _serve.tiny_bundle

TERMS = Terms(share=0.3, watch_seconds=10, requests=12, patience_seconds=900)
DEPLOY_SECONDS = 900


@dataclass
class Running:
    url: str
    recipe: Recipe
    directory: Path
    """Of the bundle that serves."""

    def serving(self) -> str:
        """Digest of the bundle that serves, once nothing else is left there."""
        told = promote.state()
        assert (told["canary"], told["canary_share"]) == ("", 0.0)
        assert told["applications"] == f"bundle-{told['serving'][:12]}"
        return str(told["serving"])


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, tiny: Recipe) -> Iterator[Running]:
    """As `speechgpt serve` starts it, on a private cluster with the environment that it gives."""
    import ray
    from ray import serve

    private = not ray.is_initialized()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gateway = tiny.serving.gateway.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    serving = tiny.serving.model_copy(update={"port": port, "gateway": gateway, "request_timeout_seconds": 180})
    chosen = tiny.model_copy(update={"serving": serving})
    source = find(str(tiny_bundle), "")
    run.start(source, chosen)
    yield Running(f"http://127.0.0.1:{port}", chosen, tiny_bundle)
    run.stop(source)
    assert not [name for name in serve.status().applications if name.startswith(app.BUNDLES)]
    serve.shutdown()
    if private:
        ray.shutdown()


@pytest.fixture(scope="module")
def make(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A bundle in a folder of its own, for what is served is named by its directory."""
    return lambda name, change: bundle_variants.remade(tiny_bundle, tmp_path_factory.mktemp("variant") / name, change)


def gateway_replicas() -> set[str]:
    """Actors of the gateway that live."""
    return {actor.name for actor in alive_actors() if f"#{GATEWAY}#" in (actor.name or "")}


def roll_out(directory: Path, terms: Terms = TERMS) -> dict:
    return promote.roll_out(str(directory), "", NoRegistry(), terms, DEPLOY_SECONDS, print)


def whole(seen: Load) -> None:
    """Each reply came from one bundle."""
    assert all(request.also <= {request.bundle[:12]} for request in seen.requests if not request.error)


def digest(directory: Path) -> str:
    return bundle.load(directory).digest


def test_a_promotion_under_load_fails_no_request(
    running: Running, make: Callable, record_property: Callable[[str, object], None]
) -> None:
    """A rolling promotion under load: no request fails, each is answered by one bundle, and at last all by the new."""
    old, new = running.serving(), make("tiny", bundle_variants.voice(7))
    replicas = gateway_replicas()
    with load(running.url) as seen:
        told = roll_out(new)
        after = time.monotonic()
        time.sleep(5)
    assert seen.failed == []
    whole(seen)
    assert {request.bundle for request in seen.requests} == {old, digest(new)}
    late = [request for request in seen.requests if request.began > after]
    assert late and {request.bundle for request in late} == {digest(new)}
    assert running.serving() == digest(new)
    running.directory = new
    assert gateway_replicas() == replicas, "the gateway was not restarted"
    record_property("requests", len(seen.requests))
    record_property("failed", 0)
    for name, value in told.items():
        record_property(name, value)


@pytest.mark.parametrize("kind", ["damaged", "of other units", "not a number"])
def test_a_poisoned_bundle_is_refused_before_anybody_is_sent_to_it(
    kind: str, running: Running, make: Callable, record_property: Callable[[str, object], None]
) -> None:
    """A bundle that is damaged, does not fit together or holds no numbers is refused, and no request notices."""
    changes = {
        "damaged": bundle_variants.voice(8),
        "of other units": bundle_variants.voice(9, clusters=16),
        "not a number": bundle_variants.not_a_number,
    }
    reasons = {
        "damaged": "vocoder/model.safetensors was changed",
        "of other units": "unit vocabularies differ: encoder 32, language model 32, vocoder 16",
        "not a number": "language/model.safetensors: .* not finite",
    }
    directory, serving = make(kind.replace(" ", "-"), changes[kind]), running.serving()
    if kind == "damaged":
        bundle_variants.damage(directory)
    with load(running.url) as seen, pytest.raises((PromotionError, BundleError), match=reasons[kind]):
        roll_out(directory)
    assert seen.failed == []
    assert {request.bundle for request in seen.requests} == {serving} == {running.serving()}
    record_property("requests", len(seen.requests))


def test_one_that_fails_its_requests_is_taken_back(
    running: Running, make: Callable, record_property: Callable[[str, object], None]
) -> None:
    """A bundle that passes its warm-up and fails its requests is taken back; no request fails but its own."""
    poisoned, serving = make("poisoned", bundle_variants.short_winded), running.serving()
    with load(running.url) as seen:
        with pytest.raises(PromotionError, match="of its .* answers failed"):
            roll_out(poisoned)
        after = time.monotonic()
        time.sleep(5)
    assert {request.bundle for request in seen.failed} == {digest(poisoned)}, seen.failed
    assert {request.bundle for request in seen.requests if request.began > after} == {serving} == {running.serving()}
    # Of what came while it was on trial, its share.
    first = min(request.began for request in seen.failed)
    tried = [request for request in seen.requests if first <= request.began <= max(r.ended for r in seen.failed)]
    assert len(seen.failed) <= TERMS.share * len(tried) + 4
    record_property("requests", len(seen.requests))
    record_property("failed, all of the poisoned bundle", len(seen.failed))


def test_one_whose_first_sound_is_late_is_taken_back(
    running: Running, make: Callable, record_property: Callable[[str, object], None]
) -> None:
    """A bundle that speaks as well, but later, is taken back, and no request fails."""
    slow, serving = make("slow", bundle_variants.laboured(30)), running.serving()
    terms = Terms(share=0.5, watch_seconds=20, requests=60, patience_seconds=1800)
    with load(running.url) as seen, pytest.raises(PromotionError, match="its first sound took") as caught:
        roll_out(slow, terms)
    assert seen.failed == []
    assert seen.by(digest(slow)) and running.serving() == serving
    record_property("requests", len(seen.requests))
    record_property("reason", str(caught.value))


@pytest.mark.parametrize(("voice", "when"), enumerate(["comes up", "gets 30%", "gets 100%"], 20))
def test_a_promotion_that_is_killed_is_repaired_by_the_next(
    voice: int, when: str, running: Running, make: Callable, record_property: Callable[[str, object], None]
) -> None:
    """kill -9 at any stage of a promotion fails no request, and the next promotion takes it up and completes it."""
    new = make("tiny", bundle_variants.voice(voice))
    with load(running.url) as seen:
        killed_at(when, new)
        time.sleep(2)
        roll_out(new)
    assert seen.failed == []
    whole(seen)
    assert running.serving() == digest(new)
    running.directory = new
    record_property("requests", len(seen.requests))


def test_one_that_was_killed_can_be_taken_back(running: Running, make: Callable) -> None:
    """--abort after a kill puts everything back to the old bundle, and no request fails."""
    new, serving = make("aborted", bundle_variants.voice(40)), running.serving()
    with load(running.url) as seen:
        process = promoting(new)
        assert until(lambda: promote.state()["canary"] == digest(new))
        process.kill()
        process.wait()
        promote.abort(NoRegistry(), print)
    assert seen.failed == []
    assert running.serving() == serving


def test_told_to_stop_it_goes_back(running: Running, make: Callable) -> None:
    """SIGTERM in the middle of a promotion: it goes back by itself, and ends with an error."""
    new, serving = make("stopped", bundle_variants.voice(41)), running.serving()
    with load(running.url) as seen:
        process = promoting(new)
        until_it_says(process, "gets 30%")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=900)
    assert process.returncode == 1
    assert seen.failed == []
    assert running.serving() == serving


def test_other_settings_roll_in_under_load(running: Running, record_property: Callable[[str, object], None]) -> None:
    """The same service started over itself with other settings: a rolling update of every deployment, no request
    fails, and the new settings hold."""
    serving = running.recipe.serving.model_copy(update={"max_text_characters": 40})
    before = gateway_replicas()
    with load(running.url) as seen:
        run.start(find(str(running.directory), ""), running.recipe.model_copy(update={"serving": serving}))
        time.sleep(5)
    assert seen.failed == []
    assert gateway_replicas().isdisjoint(before)
    long = {"model": "tiny", "voice": "alloy", "input": "two plus three is five " * 2}
    refused = httpx.post(f"{running.url}/v1/audio/speech", json=long, timeout=120)
    assert refused.json()["error"]["code"] == "string_above_max_length"
    record_property("requests", len(seen.requests))


DRIVER = """
import sys
from serve import promote
from serve.promotion import PromotionError
from serve.verdict import Terms
class NoRegistry:
    move = leave = lambda *_: None
promote.join(sys.argv[1])
try:
    promote.roll_out(sys.argv[2], "", NoRegistry(), Terms(0.3, 10, 12, 900), 900, lambda line: print(line, flush=True))
except PromotionError as error:
    print(error, flush=True)
    sys.exit(1)
"""


def promoting(directory: Path) -> "subprocess.Popen[str]":
    """In a process of its own, as the command is."""
    command = [sys.executable, "-c", DRIVER, run.cluster_address(), str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": _path()})


def until_it_says(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout
    for line in process.stdout:
        print(line, end="")
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


def killed_at(words: str, directory: Path) -> None:
    process = promoting(directory)
    until_it_says(process, words)
    process.kill()
    process.wait()


def _path() -> str:
    return os.pathsep.join(path for path in sys.path if path)
