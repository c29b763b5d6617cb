import subprocess
import sys

import pytest
import torch

from speechgpt.training import engine
from speechgpt.training.config import EngineSection, StageSection

STAGE = StageSection(mixture={"text": 1}, steps=4, micro_batch=3, accumulation=2, learning_rate=1e-3, clip=0.5)


def test_the_batch_is_the_stages_over_all_workers():
    settings = engine.configuration(EngineSection(workers=4, zero_stage=1), STAGE, workers=4)
    assert settings["train_batch_size"] == 3 * 2 * 4
    assert settings["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("zero_stage", "offloaded"), [(2, {"offload_optimizer"}), (3, {"offload_optimizer", "offload_param"})]
)
def test_offload_moves_what_the_zero_stage_allows(zero_stage, offloaded):
    section = EngineSection(zero_stage=zero_stage, offload="cpu", precision="bf16")
    zero = engine.configuration(section, STAGE, 2)["zero_optimization"]
    assert {key for key in zero if key.startswith("offload")} == offloaded


def test_deepspeed_is_imported_without_what_it_does_not_need_which_can_be_imported_all_the_same():
    program = """
import sys
from speechgpt.training.engine import import_deepspeed
assert import_deepspeed().initialize
assert not {"fairseq", "mlflow"} & sys.modules.keys()
import mlflow
assert import_deepspeed().initialize and sys.modules["mlflow"] is mlflow
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_norms_and_biases_do_not_decay(fresh_model):
    section, stage = EngineSection(workers=1, zero_stage=0), STAGE.model_copy(update={"weight_decay": 0.1})
    engine.join(section)
    started = engine.under_zero(fresh_model, section, stage, engine.configuration(section, stage, 1))
    decay = {group["weight_decay"]: group["params"] for group in started.optimizer.param_groups}
    assert all(parameter.dim() == 2 for parameter in decay[0.1])
    assert all(parameter.dim() == 1 for parameter in decay[0.0])
    assert sum(map(len, decay.values())) == len(list(fresh_model.parameters()))


def test_parameters_are_counted_with_and_without_the_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    assert engine.parameter_count(model) == 11
    assert engine.parameter_count(model, trainable=True) == 3


def test_a_cpu_says_whether_it_has_bfloat16(monkeypatch):
    for abilities, expected in (({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=abilities: found)
        assert engine.multiplies_bf16() is expected
