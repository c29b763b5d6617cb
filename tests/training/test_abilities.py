import pytest

from speechgpt import recipe
from speechgpt.training import abilities, engine, starting
from speechgpt.training.config import EngineSection, StageSection

STAGE = StageSection(mixture={"text": 1}, steps=4, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_stage": 0, "offload": "cpu"}, "nothing is sharded at 0"),
        ({"zero_stage": 2, "offload": "nvme", "nvme_path": "/scratch"}, "nvme needs engine.zero_stage 3"),
        ({"zero_stage": 3, "offload": "nvme"}, "needs a directory on each node's disk"),
        ({"zero_stage": 3, "offload": "cpu", "nvme_path": "/scratch"}, "no other offload does"),
    ],
)
def test_offloads_that_cannot_be_are_refused_by_key(section, message):
    with pytest.raises(ValueError, match=message):
        EngineSection(**section)


def test_nvme_takes_optimiser_and_weights_to_its_directory():
    section = EngineSection(zero_stage=3, offload="nvme", nvme_path="/scratch/zero")
    zero = engine.configuration(section, STAGE, 2)["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        assert (zero[part]["device"], zero[part]["nvme_path"]) == ("nvme", "/scratch/zero")


def test_nvme_without_its_operator_is_said_before_training():
    engine.import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    section = EngineSection(workers=1, zero_stage=3, offload="nvme", nvme_path="/scratch/zero")
    if AsyncIOBuilder().is_compatible(verbose=False):
        engine.join(section)
    else:
        with pytest.raises(abilities.AbilityError, match="install libaio-dev"):
            engine.join(section)


def test_an_int8_base_without_its_package_is_said_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    with pytest.raises(abilities.AbilityError, match=r"speechgpt-ray\[int8\]"):
        starting.load(tmp_path, gradient_checkpointing=False, int8=True)


def test_an_int8_base_is_not_sharded():
    settings = ("stages.chain.lora.base=int8", "engine.zero_stage=3")
    with pytest.raises(recipe.RecipeError, match=r"stages\.chain\.lora\.base: int8"):
        recipe.load("tiny", settings)
    assert recipe.load("tiny", settings[:1]).stages["chain"].lora.base == "int8"
