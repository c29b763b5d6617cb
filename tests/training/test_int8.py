"""Where bitsandbytes is installed (`pip install 'speechgpt-ray[int8]'`): LoRA learns on a base in eight bits."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from speechgpt.training import blocks, engine, loop, packing
from speechgpt.training.config import EngineSection, LoraSection, StageSection
from speechgpt.training.export import export
from speechgpt.training.objective import Objective
from speechgpt.training.starting import add_lora, load

pytest.importorskip("bitsandbytes")


class Nothing:
    def newest_first(self):
        return iter(())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_learns_on_an_int8_base(fresh_model, tmp_path, precision):
    rng = np.random.default_rng(0)
    # Most tokens never come, which is soon learnt.
    rows = [[(rng.integers(3, 20, length), np.ones(length, np.float32)) for length in (9, 14, 6)] for _ in range(40)]
    packed = [packing.pack(part, 32, pad_id=0) for part in rows]
    blocks.write(tmp_path / "blocks.arrow", [blocks.table(range(40), packed)], 32)
    fresh_model.save_pretrained(tmp_path / "base")
    modules = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora = LoraSection(rank=4, alpha=8, dropout=0.0, base="int8", target_modules=modules)
    stage = StageSection(
        mixture={"text": 1}, steps=20, block=32, micro_batch=2, learning_rate=2e-2, log_every=5, lora=lora
    )
    section = EngineSection(workers=1, zero_stage=2, precision=precision)
    engine.join(section)
    model = add_lora(load(tmp_path / "base", gradient_checkpointing=True, int8=True), lora, "crossmodal", seed=1)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert sum(parameter.dtype == torch.int8 for parameter in frozen) == 2 * 7, "every linear layer but the head"
    settings = engine.configuration(section, stage, 1)
    losses: list[float] = []

    def report(figures, directory):
        if directory is None:
            losses.append(figures["loss"])

    started = engine.under_zero(Objective(model, 44, 20), section, stage, settings)
    loop.train(started, blocks.Blocks(tmp_path / "blocks.arrow"), stage, report, Nothing())
    assert losses[-1] < losses[0] - 0.02
    export(started, tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
