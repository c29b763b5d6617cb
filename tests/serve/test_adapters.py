"""A bundle's named adapters are models of the API beside the bundle itself."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from serve.bundles import find
from serve.gateway import create_app
from serve.memory import OwnMemory
from serve.pipeline import OwnPipeline
from serve.service import Served, Service
from speechgpt.recipe import Recipe
from speechgpt.runtime import bundle
from speechgpt.runtime.bundle import BundleError

PARTS = ("encoder", "language", "vocoder")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "what is two plus three"}], "temperature": 0}
SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}


@pytest.fixture(scope="module")
def adapter(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    from speechgpt.language.model import SpeechLanguageModel

    model: Any = deepcopy(SpeechLanguageModel.load(tiny_bundle / "language").model)
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(str(directory))
    return directory


def made(tiny_bundle: Path, directory: Path, **adapters: Path) -> Path:
    """tiny's parts with adapters; `own` is the bundle's own."""
    parts = {name: tiny_bundle / name for name in PARTS}
    for name, path in adapters.items():
        parts["adapter" if name == "own" else f"adapters/{name}"] = path
    directory.mkdir(parents=True)
    bundle.write(directory, parts, bundle.load(tiny_bundle).manifest["unit_vocabulary"], {})
    return directory


def gateway(directory: Path, tiny: Recipe) -> TestClient:
    source = find(str(directory), "")
    served = Served(source.name, source.digest, source.created, source.adapters)
    pipeline = OwnPipeline(directory, tiny.serving)
    service = Service(served, pipeline, OwnMemory(60, 10), tiny.serving, tiny.generation)
    return TestClient(create_app(lambda: service, list, tiny.serving, None))


@pytest.fixture(scope="module")
def named(tiny_bundle: Path, adapter: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A bundle `tiny` with an adapter `pirate`."""
    return gateway(made(tiny_bundle, tmp_path_factory.mktemp("named") / "tiny", pirate=adapter), tiny)


@pytest.fixture(scope="module")
def own(tiny_bundle: Path, adapter: Path, tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A bundle `tiny` whose own adapter it is."""
    return gateway(made(tiny_bundle, tmp_path_factory.mktemp("own") / "tiny", own=adapter), tiny)


def answer(reply: Any) -> tuple[Any, Any]:
    assert reply.status_code == 200, reply.text
    message, usage = reply.json()["choices"][0]["message"], reply.json()["usage"]
    return {**message, "audio": {**(message["audio"] or {}), "id": "", "expires_at": 0}}, usage


def test_each_is_listed_and_answers_as_it_would_alone(http: TestClient, named: TestClient, own: TestClient) -> None:
    assert [model["id"] for model in named.get("/v1/models").json()["data"]] == ["tiny", "pirate"]
    assert named.get("/v1/models/pirate").json()["id"] == "pirate"
    for more in ({}, SPOKEN):
        plain, adapted = (answer(each.post("/v1/chat/completions", json=CHAT | more | {"model": "tiny"}))
                          for each in (http, own))  # fmt: skip
        assert plain != adapted
        assert answer(named.post("/v1/chat/completions", json=CHAT | more | {"model": "tiny"})) == plain
        reply = named.post("/v1/chat/completions", json=CHAT | more | {"model": "pirate"})
        assert reply.json()["model"] == "pirate"
        assert answer(reply) == adapted


def test_it_writes_down_speaks_and_streams_too(named: TestClient, own: TestClient, clip: bytes) -> None:
    def heard(client: TestClient, model: str) -> tuple[str, bytes, str]:
        form = {"model": model, "temperature": "0"}
        written = client.post("/v1/audio/transcriptions", data=form, files={"file": ("clip.wav", clip)})
        lines = client.post("/v1/chat/completions", json=CHAT | {"model": model, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert {chunk["model"] for chunk in chunks} == {model}
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        read = {"model": model, "input": "hello", "voice": "alloy", "response_format": "wav"}
        spoken = client.post("/v1/audio/speech", json=read)
        return written.json()["text"], spoken.content, said

    assert heard(named, "pirate") == heard(own, "tiny")


def test_others_are_told_who_is_here(named: TestClient) -> None:
    reply = named.post("/v1/chat/completions", json=CHAT | {"model": "parrot"})
    assert reply.status_code == 404
    assert "'parrot' is not served here; 'tiny' and 'pirate' are" in reply.json()["error"]["message"]


def test_names_are_checked(tiny_bundle: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="adapter 'tiny' has the name of the model"):
        find(str(made(tiny_bundle, tmp_path / "tiny", tiny=adapter)), "")
    with pytest.raises(BundleError, match=r"unknown parts of a bundle: adapters/\.\./x"):
        made(tiny_bundle, tmp_path / "b", **{"../x": adapter})
