"""Adapters of PEFT 0.3 load in the PEFT of today, and do what they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from speechgpt.interop.adapter import convert_adapter
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.llama import convert_language


@pytest.fixture
def copy(published, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published.com, tmp_path / "com"))


def test_the_adapter_adds_what_lora_defines(published, tmp_path: Path) -> None:
    convert_language(published.cm, tmp_path / "language")
    figures = convert_adapter(published.com, tmp_path / "adapter")
    assert figures == {"rank": 8, "alpha": 16, "modules": 4, "parameters": 4 * 2 * 8 * 32}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    lora = torch.load(published.com / "adapter_model.bin", weights_only=True)
    for name, before in plain.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        added = 0.0
        if f"{module}.lora_A.weight" in lora:
            # W + alpha / r * B A (Hu et al. 2021).
            added = 16 / 8 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        torch.testing.assert_close(merged[name], before + added)
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.weight"]
    )


def test_names_with_and_without_the_adapters_name_are_read(copy: Path, published, tmp_path: Path) -> None:
    state = torch.load(copy / "adapter_model.bin", weights_only=True)
    (copy / "adapter_model.bin").unlink()
    torch.save({n.replace(".weight", ".default.weight"): t for n, t in state.items()}, copy / "pytorch_model.bin")
    convert_adapter(copy, tmp_path / "one")
    convert_adapter(published.com, tmp_path / "other")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def settings(copy: Path, **changes: object) -> None:
    facts = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "not 'PREFIX_TUNING'"),
        ({"r": 4}, r"\[8, 32\], but adapter_config.json says r = 4"),
        ({"r": None}, "r and target_modules are needed"),
        ({"target_modules": ["q_proj"]}, "v_proj.*targets only q_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no matrix for o_proj"),
        ({"bias": "all"}, "bias or modules_to_save"),
        ({"enable_lora": [True, False]}, "enable_lora is set"),
        ({"sparsity": 3}, "unknown setting 'sparsity'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(copy: Path, tmp_path: Path, changes: dict, said: str) -> None:
    settings(copy, **changes)
    with pytest.raises(ConversionError, match=said):
        convert_adapter(copy, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_settings_of_earlier_versions_that_mean_nothing_are_dropped(copy: Path, tmp_path: Path) -> None:
    settings(copy, enable_lora=None, merge_weights=False)
    assert convert_adapter(copy, tmp_path / "adapter")["rank"] == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.clear(), "holds no tensor at all"),
        (lambda state: state.popitem(), "has no lora_B"),
        (lambda state: [state.pop(name) for name in list(state) if "1.self_attn.v" in name], "1.self_attn.v_proj"),
        (lambda state: state.update({"lm_head.weight": torch.ones(2, 2)}), "lm_head.weight is not a LoRA matrix"),
    ],
)
def test_files_that_do_not_fit_are_refused(copy: Path, tmp_path: Path, change, said: str) -> None:
    state = torch.load(copy / "adapter_model.bin", weights_only=True)
    change(state)
    torch.save(state, copy / "adapter_model.bin")
    with pytest.raises(ConversionError, match=said):
        convert_adapter(copy, tmp_path / "adapter")
