"""One tiny bundle, made by the real classes; its service in this process, and on one Ray Serve for all tests."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from live_service import live_service
from starlette.testclient import TestClient

from serve.bench_service import unending
from serve.bundles import find
from serve.gateway import create_app
from serve.memory import OwnMemory
from serve.pipeline import OwnPipeline
from serve.service import Served, Service
from speechgpt import recipe
from speechgpt.recipe import Recipe
from speechgpt.runtime import bundle
from speechgpt.runtime.config import TracesSection

QUESTION = "what is two plus three"
ANSWER = "two plus three is five"
SPOKEN = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4)
"""The units of every spoken answer."""
CLUSTERS = 32
CONTEXT = 512
ENDLESS = 131_072
"""Tokens in the context of the model that does not end."""


def speech(seconds: float = 1.0, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """float32 [samples]: a gliding tone in syllables, with some noise, which random encoders hear as changing units."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    syllables = np.sin(2 * np.pi * 2 * time) ** 2
    return (0.4 * syllables * np.sin(2 * np.pi * (220 + 200 * time) * time) + noise).astype(np.float32)


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    return recipe.load(
        "tiny",
        (
            "generation.max_new_tokens=80",
            "generation.max_text_tokens=30",
            "serving.max_audio_seconds=8",
            "serving.max_body_bytes=2000000",
            "serving.max_text_characters=400",
            "serving.request_timeout_seconds=60",
            "serving.language={max_ongoing_requests: 4, max_queued_requests: 4, max_replicas: 1, batch: 4}",
            "serving.encoder.max_replicas=1",
            "serving.vocoder.max_replicas=1",
            "serving.gateway.max_replicas=1",
        ),
    )


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Recipe) -> Path:
    """A bundle directory named `tiny`."""
    import torch

    parts = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _encoder(parts / "encoder", tiny)
    _language(parts / "language", tiny)
    _vocoder(parts / "vocoder", tiny)
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    directory.mkdir()
    named = {name: parts / name for name in ("encoder", "language", "vocoder")}
    bundle.write(directory, named, {"units": CLUSTERS}, {"recipe": "tiny"})
    return directory


@pytest.fixture(scope="session")
def endless_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """The same, named `endless`, but its model never ends what it says: only limits do.

    Its context is so long that no machine fills it within the seconds a test has.
    """
    language = tmp_path_factory.mktemp("endless-parts") / "language"
    shutil.copytree(tiny_bundle / "language", language)
    unending(language)
    settings = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": ENDLESS}))
    directory = tmp_path_factory.mktemp("bundles") / "endless"
    directory.mkdir()
    named = {name: tiny_bundle / name for name in ("encoder", "vocoder")} | {"language": language}
    bundle.write(directory, named, {"units": CLUSTERS}, {"recipe": "tiny"})
    return directory


@pytest.fixture(scope="session")
def service(tiny_bundle: Path, tiny: Recipe) -> Service:
    """The bundle loaded into this process."""
    source = find(str(tiny_bundle), "")
    pipeline = OwnPipeline(tiny_bundle, tiny.serving)
    served = Served(source.name, source.digest, source.created)
    return Service(served, pipeline, OwnMemory(60, 10), tiny.serving, tiny.generation)


@pytest.fixture(scope="session")
def http(service: Service) -> TestClient:
    """The gateway's application without Serve."""
    return TestClient(create_app(lambda: service, list, service.serving, None))


@pytest.fixture(scope="session")
def clip() -> bytes:
    """A WAV of one second in which somebody seems to speak."""
    from speechgpt.speech.audio import encode

    return encode(speech(1.0), "wav")


@pytest.fixture(scope="session")
def long_clip() -> bytes:
    """One of nearly as many seconds as the service takes."""
    from speechgpt.speech.audio import encode

    return encode(speech(7.5), "wav")


@pytest.fixture(scope="session")
def service_url(tiny_bundle: Path, tiny: Recipe, ray_cluster: None) -> Iterator[str]:
    """The bundle on a real Ray Serve, started as `speechgpt serve` starts it. Who asks it comes last of all tests: it
    holds CPUs of the cluster to the end."""
    with live_service(tiny_bundle, tiny, traces=TracesSection(share=1)) as running:
        yield running.url


@pytest.fixture(scope="session")
def client(service_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0)


def _encoder(directory: Path, tiny: Recipe) -> None:
    from transformers import HubertConfig, HubertModel

    from speechgpt.speech import hubert
    from speechgpt.speech.codebook import Codebook
    from speechgpt.speech.encoder import HubertFeatures

    directory.mkdir()
    hubert.save(HubertModel(HubertConfig(**tiny.encoder.architecture)), directory, layer=2, normalize=True)
    frames = HubertFeatures.load(directory)([speech(4.0, seed=seed) for seed in range(2)])
    spread = np.concatenate([np.asarray(clip) for clip in frames])
    import torch

    chosen = np.random.default_rng(0).choice(len(spread), CLUSTERS, replace=False)
    Codebook(torch.from_numpy(spread[chosen])).save(directory)


def _language(directory: Path, tiny: Recipe) -> None:
    """A model that has learnt nothing but the form of a reply: random weights would hardly ever close one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from speechgpt.language.prompts import PromptFormat
    from speechgpt.language.scratch import train_tokenizer
    from speechgpt.language.vocabulary import Vocabulary

    vocabulary = Vocabulary.grow(train_tokenizer([QUESTION, ANSWER, *rows()], 400), CLUSTERS, "whole")
    shape = {**tiny.language.architecture, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary.padded_size(64)))
    encoded = [vocabulary.encode_row("", row).ids for row in rows()]
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [vocabulary.pad] * (longest - len(row)) for row in encoded])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    vocabulary.save(directory)
    PromptFormat(dialect="paper", prefix="").save(directory)


def rows() -> list[str]:
    """One dialogue in every form, the question's units different each time."""
    from speechgpt.language.prompts import Exchange, Kind, descriptions, row_text

    kinds: tuple[Kind, ...] = ("transcribe", "speak", "s2s", "s2t", "t2s", "t2t")
    draw = np.random.default_rng(0)
    texts = []
    for kind in kinds * 2:
        heard = tuple(int(unit) for unit in draw.permutation(CLUSTERS)[:20])
        question, answer = (ANSWER, "") if kind == "speak" else (QUESTION, QUESTION if kind == "transcribe" else ANSWER)
        wording = descriptions(kind)[0] if kind in ("transcribe", "speak") else ""
        texts.append(row_text("paper", [Exchange(kind, question, answer, heard, SPOKEN, wording)]))
    return texts


def _vocoder(directory: Path, tiny: Recipe) -> None:
    from speechgpt.speech.vocoder import UnitVocoder, Vocoder

    Vocoder(UnitVocoder(tiny.vocoder.generator, CLUSTERS)).save(directory)
