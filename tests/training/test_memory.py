import pytest

from speechgpt.training import memory
from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.cross_entropy import CHUNK_LOGITS
from speechgpt.training.memory import EstimatorError
from speechgpt.training.shape import Kept, Products, Shape

P = 7_000_000_000
WHOLE = Shape(P, P, 100_000_000, 32, 4096, 33_000, Products(P, P, 0, 0))
ADAPTED = WHOLE._replace(trainable=4_000_000)
KEPT = Kept(500 << 20, 25 << 20, 80 << 20)
STAGE = StageSection(mixture={"text": 1}, steps=10, block=1024, micro_batch=3, learning_rate=1e-4)


def engine(**changes) -> EngineSection:
    return EngineSection(**{"zero_stage": 2, "precision": "bf16", "gpus_per_worker": 1, **changes})


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("gpus", [1, 16])
def test_our_states_are_those_of_deepspeed_s_own_estimators(gpus, offload):
    two, _ = memory.deepspeed_states(WHOLE, engine(offload=offload), gpus, 1)
    assert memory.states(WHOLE, engine(offload=offload), gpus).device == two
    # ZeRO-3's estimate has the largest layer, gathered in float32, on top.
    section = engine(zero_stage=3, offload=offload)
    three = memory.deepspeed_states(WHOLE, section, gpus, 1)[0] - 4 * WHOLE.largest_layer
    assert abs(memory.states(WHOLE, section, gpus).device - three) <= 2 * P // gpus + 1


def test_deepspeed_does_not_estimate_what_it_does_not_know():
    for section, shape in ((engine(zero_stage=1), WHOLE), (engine(precision="fp32"), WHOLE), (engine(), ADAPTED)):
        with pytest.raises(EstimatorError, match="16-bit training of all weights"):
            memory.deepspeed_states(shape, section, 8, 1)


def test_each_zero_stage_holds_less_of_what_it_shards():
    one, two, three = (memory.states(WHOLE, engine(zero_stage=zero), 8) for zero in (1, 2, 3))
    assert one.weights == two.weights == 8 * three.weights
    assert one.gradients == 8 * two.gradients == 8 * three.gradients
    assert one.optimizer == two.optimizer == three.optimizer


def test_lora_has_optimiser_and_gradients_of_its_adapters_alone():
    states = memory.states(ADAPTED, engine(), 1)
    assert states.weights == 2 * P
    assert states.optimizer == 12 * 4_000_000
    assert states.gradients == 2 * 4_000_000


def test_offload_moves_states_to_the_host():
    here, there = memory.states(WHOLE, engine(), 8), memory.states(WHOLE, engine(offload="cpu"), 8)
    assert there.host == here.optimizer + here.gradients + here.step_gradients
    assert there.device == here.weights


def test_checkpointing_gradients_saves_activations_and_nothing_else():
    without = memory.footprint(WHOLE, KEPT, engine(), STAGE, 8)
    with_it = memory.footprint(WHOLE, KEPT, engine(gradient_checkpointing=True), STAGE, 8)
    assert without.activations - with_it.activations == 31 * KEPT.layer - 32 * KEPT.inputs
    assert without.peak - with_it.peak == without.activations - with_it.activations


def test_logits_are_held_a_chunk_at_a_time():
    few = STAGE.model_copy(update={"micro_batch": 1})
    assert memory.footprint(WHOLE, KEPT, engine(), few, 8).logits == 1024 * 33_000 * 14
    # 101 million of them, of which no more than 67 million are there at once.
    assert memory.footprint(WHOLE, KEPT, engine(), STAGE, 8).logits == CHUNK_LOGITS * 14


def test_nvme_holds_what_the_host_would_and_the_host_what_passes_through():
    section = engine(zero_stage=3, offload="nvme", nvme_path="/nvme")
    there, on_host = memory.states(WHOLE, section, 8), memory.states(WHOLE, engine(zero_stage=3, offload="cpu"), 8)
    assert there.device == on_host.device == 0
    assert there.disk == (12 + 4 + 2) * P // 8
    # Gradients in 16 bits, two kinds of buffers, and the weights that DeepSpeed keeps at hand.
    assert there.host == 2 * P // 8 + 2 * 5 * 10**8 + 2 * P // 8 + 4 * 4 * P // 8
    more = memory.states(WHOLE._replace(parameters=100 * P, trainable=100 * P), section, 8)
    assert more.host == 2 * 100 * P // 8 + 2 * (5 * 10**8 + 10**9) + 4 * 4 * 10**9, "buffers do not grow with the model"


def test_an_8_bit_base_takes_a_byte_a_weight():
    eight_bit = 6_500_000_000
    states = memory.states(ADAPTED._replace(eight_bit=eight_bit), engine(), 1)
    assert states.weights == 2 * (P - eight_bit) + eight_bit
    assert states.optimizer == memory.states(ADAPTED, engine(), 1).optimizer


def test_a_checkpoint_is_fourteen_bytes_a_parameter_in_sixteen_bits():
    assert memory.checkpoint_bytes(WHOLE, engine()) == 14 * P
    assert memory.checkpoint_bytes(WHOLE, engine(precision="fp32", zero_stage=0)) == 12 * P
    assert memory.checkpoint_bytes(ADAPTED, engine()) == 2 * P + 12 * 4_000_000


@pytest.mark.parametrize(
    ("section", "stage", "shape", "measured"),
    [
        ({"workers": 1, "zero_stage": 0}, {"micro_batch": 1}, 97_241_856, 2206),
        ({"workers": 1, "zero_stage": 1}, {"micro_batch": 2}, 97_241_856, 3092),
        ({"workers": 2, "zero_stage": 2, "gradient_checkpointing": True}, {"micro_batch": 2}, 97_241_856, 2065),
        ({"workers": 1, "zero_stage": 2}, {"micro_batch": 2, "lora": {}}, 294_912, 1200),
    ],
    ids=["zero-0", "zero-1", "zero-2", "lora"],
)
def test_measured_processes_are_met(section, stage, shape, measured):
    """Peaks in MB of real ones, of 97 million parameters in blocks of 256 tokens; tests/evidence measures them anew."""
    lora = "lora" in stage
    whole = 97_241_856 + (shape if lora else 0)
    model = Shape(whole, shape, 6_144_000, 12, 768, 8000, Products(whole, shape, 0, 0))
    one = Kept(14_448_640, 786_432, 984_064) if lora else Kept(16_529_408, 786_432, 1_772_544)
    settings = StageSection(mixture={"text": 1}, steps=2, block=256, learning_rate=1e-4, **stage)
    kept = Kept(*(settings.micro_batch * part for part in one))
    run = EngineSection(**section)
    planned = memory.footprint(model, kept, run, settings, run.workers).peak
    assert planned / 1e6 == pytest.approx(measured, rel=0.05)
