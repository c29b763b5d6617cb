"""Two bundles behind one gateway in this process: what replies say of theirs, and what is counted."""

import json
from pathlib import Path

import bundle_variants
import pytest
from starlette.testclient import TestClient

from serve.bundles import Source, find
from serve.errors import FULL_HEADER, ApiError
from serve.gateway import create_app
from serve.memory import OwnMemory
from serve.meters import Meters
from serve.pipeline import OwnPipeline
from serve.prompting import Reply, Task
from serve.service import Served, Service
from serve.soundness import broken_tensor
from serve.switch import Route, Switch, Target, settled
from serve.tally import STREAMED, WHOLE, Tallied, Tally
from speechgpt.recipe import Recipe

SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "what is two plus three"}]}
READ = {"model": "tiny", "voice": "alloy", "input": "two plus three is five", "response_format": "wav"}


@pytest.fixture(scope="module")
def poisoned(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_variants.remade(tiny_bundle, tmp_path_factory.mktemp("p") / "poisoned", bundle_variants.short_winded)


@pytest.fixture(scope="module")
def gateway(tiny_bundle: Path, poisoned: Path, tiny: Recipe) -> tuple[TestClient, Switch, Tally, Source, Source]:
    """(client, switch, tally, the bundle that serves, the one on trial)."""
    old, new = find(str(tiny_bundle), ""), find(str(poisoned), "")
    pipelines = {source.digest: OwnPipeline(Path(source.address), tiny.serving) for source in (old, new)}
    tally = Tally()

    def service(name: str, route: Route) -> Service:
        digest = route["digest"]
        tallied = Tallied(pipelines[digest], digest, tally, Meters())
        return Service(Served(name, digest, 1), tallied, OwnMemory(60, 10), tiny.serving, tiny.generation)

    switch = Switch(tally, service)
    app = create_app(
        switch.service,
        list,
        tiny.serving,
        None,
        digest=switch.digest,
        ended=lambda visit, ending: tally.end(visit, ending.status),
    )
    return TestClient(app, raise_server_exceptions=False), switch, tally, old, new


def target(old: Source, new: Source, share: float) -> Target:
    routes = [Route(application="", digest=source.digest, created=1, adapters=[]) for source in (old, new)]
    return Target(name="tiny", serving=routes[0], canary=routes[1], share=share, watch="")


def test_a_reply_is_of_one_bundle_and_counts_for_it(gateway: tuple) -> None:
    http, switch, tally, old, new = gateway
    switch.turn(target(old, new, 0.0))
    whole = http.post("/v1/chat/completions", json=CHAT | SPOKEN)
    assert whole.headers["x-speechgpt-bundle"] == old.digest
    assert whole.json()["system_fingerprint"] == f"fp_{old.digest[:12]}"
    lines = http.post("/v1/chat/completions", json=CHAT | SPOKEN | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {f"fp_{old.digest[:12]}"}
    figures = tally.of(old.digest)
    assert (figures.answered, figures.failed, figures.ongoing) == (2, 0, 0)
    assert len(figures.seconds[STREAMED]) == len(figures.seconds[WHOLE]) == 1
    assert new.digest not in tally.bundles


def test_what_comes_to_no_model_is_not_counted(gateway: tuple) -> None:
    http, switch, tally, old, new = gateway
    switch.turn(target(old, new, 1.0))
    tally.restart()
    assert http.get("/healthz").headers["x-speechgpt-bundle"] == old.digest
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert http.post("/v1/chat/completions", json=CHAT | {"model": "other"}).status_code == 404
    assert not any(figures.answered or figures.ongoing for figures in tally.bundles.values())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/speech", READ),
        ("/v1/audio/speech", READ | {"response_format": "pcm"}),
        ("/v1/chat/completions", CHAT | SPOKEN | {"stream": True}),
    ],
    ids=["whole", "raw sound", "events"],
)
def test_failures_count_whatever_the_status_says(gateway: tuple, path: str, body: dict) -> None:
    """A stream that breaks has said 200 by then."""
    http, switch, tally, old, new = gateway
    switch.turn(target(old, new, 1.0))
    tally.restart()
    reply = http.post(path, json=body)
    assert reply.headers["x-speechgpt-bundle"] == new.digest
    figures = tally.of(new.digest)
    assert (figures.answered, figures.failed, figures.ongoing) == (1, 1, 0)
    switch.turn(settled("tiny", Route(application="", digest=old.digest, created=1, adapters=[])))
    assert http.post(path, json=body).headers["x-speechgpt-bundle"] == old.digest
    assert (tally.of(old.digest).answered, tally.of(old.digest).failed) == (1, 0)


def test_a_canary_without_room_says_nothing_of_the_bundle_that_serves(
    gateway: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy would refuse what comes next."""
    http, switch, _, old, new = gateway

    async def no_room(self: OwnPipeline, task: Task) -> Reply:
        raise ApiError(429, "", code="at_capacity")

    monkeypatch.setattr(OwnPipeline, "reply", no_room)
    told = []
    for share in (0.0, 1.0):
        switch.turn(target(old, new, share))
        reply = http.post("/v1/chat/completions", json=CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "at_capacity")
        told.append(FULL_HEADER in reply.headers)
    assert told == [True, False]


def test_numbers_that_are_not_finite_are_named(tiny_bundle: Path, tmp_path: Path, poisoned: Path) -> None:
    assert broken_tensor(tiny_bundle) is None and broken_tensor(poisoned) is None
    broken = bundle_variants.remade(tiny_bundle, tmp_path / "nan", bundle_variants.not_a_number)
    assert str(broken_tensor(broken)).startswith("language/model.safetensors: ")


def test_a_model_that_gives_no_numbers_does_not_warm_up(tiny_bundle: Path, tmp_path: Path, tiny: Recipe) -> None:
    import asyncio

    from serve.prompting import Prompter, Read, Sampling
    from speechgpt.language.config import GenerationSection

    def all_of_it(parts: Path) -> None:
        bundle_variants.not_a_number(parts, every=True)

    broken = bundle_variants.remade(tiny_bundle, tmp_path / "nans", all_of_it)
    warm_up = Read("hello", Sampling(GenerationSection(temperature=0, max_new_tokens=4)))
    with pytest.raises(RuntimeError, match="ArithmeticError"):
        asyncio.run(Prompter.load(broken, tiny.serving).reply(warm_up))
