import json

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speechgpt.training.config import LoraSection
from speechgpt.training.export import export

IDS = torch.tensor([[3, 9, 50, 60, 7]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_trained_model_loads_by_transformers_and_answers_the_same(trained, tmp_path):
    engine, _ = trained()
    export(engine, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(engine.module.model))
    # Tied: the head is the embedding, stored once.
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_lora_stage_leaves_an_adapter_that_peft_loads(trained, fresh_model, tmp_path):
    engine, _ = trained(lora=LoraSection(rank=2, alpha=4), steps=4)
    export(engine, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not (tmp_path / "adapter" / "README.md").exists(), "it would name a place of this machine"
    section = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert section["base_model_name_or_path"] == "crossmodal"
    assert section["target_modules"] == sorted(section["target_modules"]), "the same training gives the same bytes"
    loaded = PeftModel.from_pretrained(fresh_model, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(engine.module.model))
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), logits(engine.module.model))
