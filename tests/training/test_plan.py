from pathlib import Path

import pytest
from transformers import LlamaConfig

from speechgpt.training import hardware
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.hardware import HardwareError
from speechgpt.training.plan import Sizes, on_machines, plan, problem

TABLE = hardware.load()
STAGE = StageSection(mixture={"text": 1}, steps=100, block=256, micro_batch=8, accumulation=2, learning_rate=1e-4)


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    """400 million parameters: 8 GiB of states on one worker in float32."""
    return Sizes(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=20,
            num_attention_heads=16,
            tie_word_embeddings=False,
        )
    )


def gpus(count: int, gib: float, **kind) -> hardware.Machines:
    made = {"memory_gib": gib, "tflops": 100, "per_hour": 2, "per_node": 8, "node_memory_gib": 500, **kind}
    return hardware.Machines(count, "card", hardware.KindSection(**made), True)


def test_kinds_are_parsed_and_unknown_ones_named():
    machines = hardware.parse("16xA100-80", TABLE)
    assert (machines.number, machines.nodes, machines.gpu) == (16, 2, True)
    assert not hardware.parse("2xCPU", TABLE).gpu
    with pytest.raises(HardwareError, match=r"no kind 'A1000' in the table; it has \['A100-40'"):
        hardware.parse("2xA1000", TABLE)
    with pytest.raises(HardwareError, match="16xA100-80"):
        hardware.parse("A100-80", TABLE)


def test_a_user_s_table_is_read_and_its_mistakes_named(tmp_path: Path):
    file = tmp_path / "prices.yaml"
    whole = {"prices": {"as_of": "2026-01", "source": "contract"}, "mfu": 0.4}
    file.write_text(str(whole | {"gpus": {"X": {"memory_gib": 80, "tflops": 1, "per_hour": 1, "per_node": 8}}}))
    with pytest.raises(HardwareError, match=r"prices.yaml: gpus.X.node_memory_gib: Field required"):
        hardware.load(file)
    with pytest.raises(HardwareError, match="cannot be read"):
        hardware.load(tmp_path / "none.yaml")


def test_devices_are_known_by_torch_s_names():
    assert hardware.peak_of("NVIDIA A100-SXM4-80GB", TABLE) == 312e12
    assert hardware.peak_of("NVIDIA H100 80GB HBM3", TABLE) == 989e12
    assert hardware.peak_of("Radeon", TABLE) is None


def test_the_batch_holds_whatever_the_number_of_machines():
    engine = EngineSection(workers=4)
    for count in (1, 2, 8, 16):
        setting = on_machines(engine, STAGE, gpus(count, 80))
        assert setting.stage.accumulation * count * STAGE.micro_batch >= 4 * 16
        assert setting.engine.workers == count
    assert on_machines(engine, STAGE, gpus(2, 80)).stage.accumulation == 4


def test_hours_and_cost_follow_from_operations_and_prices(sizes):
    made = plan("base", sizes, EngineSection(workers=2, precision="bf16"), STAGE, gpus(2, 80), TABLE)
    assert made.fits and not made.remedy
    assert made.tokens == 100 * 256 * 8 * 2 * 2
    products = made.shape.products
    assert made.hours == pytest.approx(6 * (products.body + products.head) * made.tokens / (2e14 * 0.35) / 3600)
    assert made.cost == pytest.approx(made.hours * 2 * 2)
    assert made.kept_bytes == 2 * made.checkpoint_bytes
    assert set(made.deepspeed) == {"zero-2", "zero-3"}


def test_what_cannot_fit_is_told_the_smallest_change(sizes):
    engine = EngineSection(workers=2, zero_stage=0, precision="fp32")
    made = plan("base", sizes, engine, STAGE, gpus(2, 12), TABLE)
    assert not made.fits and "a worker needs" in made.why_not
    assert made.remedy == "engine.gradient_checkpointing=true"
    changed = engine.model_copy(update={"gradient_checkpointing": True})
    assert not problem(sizes, on_machines(changed, STAGE, gpus(2, 12)), TABLE)


def test_more_machines_are_the_last_resort(sizes):
    engine = EngineSection(workers=1, precision="fp32")
    # Too little room on the host for the optimiser, too.
    made = plan("base", sizes, engine, STAGE, gpus(1, 14.9, node_memory_gib=4), TABLE)
    assert not made.fits and made.remedy.endswith("2 × card")
    hopeless = plan("base", sizes, engine, STAGE, gpus(1, 2.3), TABLE)
    assert hopeless.remedy == ""


def test_what_lies_on_disk_must_fit_there(sizes):
    engine = EngineSection(
        workers=1, precision="bf16", zero_stage=3, offload="nvme", nvme_path="/nvme", gradient_checkpointing=True
    )
    stage = STAGE.model_copy(update={"micro_batch": 1})
    made = plan("base", sizes, engine, stage, gpus(1, 14, node_disk_gib=100), TABLE)
    assert made.fits and made.disk_bytes == 18 * made.shape.parameters
    assert "zero-3 checkpointing nvme" in made.grid and "zero-2 nvme" not in made.grid
    small = plan("base", sizes, engine, stage, gpus(1, 14, node_disk_gib=5), TABLE)
    assert not small.fits and "a node's disk needs" in small.why_not


def test_the_disk_is_offered_where_neither_gpu_nor_host_has_room():
    huge = Sizes(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=80,
            num_attention_heads=64,
            tie_word_embeddings=False,
        )
    )
    engine = EngineSection(workers=8, precision="bf16")
    card = gpus(8, 40, node_memory_gib=1000, node_disk_gib=7000)
    made = plan("base", huge, engine, STAGE.model_copy(update={"micro_batch": 1}), card, TABLE)
    assert "engine.offload=nvme" in made.remedy and "card" not in made.remedy
