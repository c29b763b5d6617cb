import pytest
import torch
from tiny_models import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from speechgpt.training import shape
from speechgpt.training.config import LoraSection
from speechgpt.training.starting import add_lora

SMALL = LLAMA | {"num_hidden_layers": 3}
LORA = LoraSection(rank=2, alpha=4)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_counted_on_meta_is_what_a_real_model_has(lora, tied):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    measured = shape.measure(model.config, lora)
    if lora:
        model = add_lora(model, lora, "", seed=0)
    assert measured.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert measured.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert measured.products == shape.products(model)
    assert measured.products.head == 64 * 32
    assert measured.products.head_trained == (0 if lora else 64 * 32)


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen2Config(**SMALL)], ids=["llama", "qwen"])
def test_layers_keep_alike_and_the_difference_is_one_layer(config):
    kept = shape.kept(config, None, torch.float32, 2, 16, masked=True)
    assert kept.inputs == 2 * 16 * 32 * 4
    # More than its inputs and outputs, less than a copy after every operation would be.
    assert 8 * kept.inputs < kept.layer < 60 * kept.inputs
    assert kept.total(3, checkpointing=False) == 3 * kept.layer + kept.rest
    assert kept.total(30, checkpointing=True) == 30 * kept.inputs + kept.layer + kept.rest


def test_a_real_forward_pass_keeps_what_was_reckoned():
    """Everything but attention, which the real one does in another way on each machine."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(torch.zeros(2, 32, dtype=torch.long), use_cache=False).last_hidden_state
    reckoned = shape.kept(model.config, None, torch.float32, 2, 32, masked=False)
    assert hidden.grad_fn is not None
    assert sum(storages.values()) == pytest.approx(reckoned.total(3, checkpointing=False), rel=0.1)


def test_masks_are_kept_once_and_in_each_layer_in_its_precision():
    config = LlamaConfig(**SMALL)
    without, masked = (shape.kept(config, None, torch.bfloat16, 2, 16, masked=masked) for masked in (False, True))
    assert masked.layer - without.layer == 2 * 16 * 16 * 2
    assert masked.rest - without.rest == 2 * 16 * 16
    assert masked.inputs == without.inputs


def test_an_8_bit_base_is_its_frozen_linear_layers():
    config = LlamaConfig(**SMALL)
    assert shape.measure(config, None).eight_bit == shape.measure(config, LoraSection()).eight_bit == 0
    found = shape.measure(config, LoraSection(base="int8"))
    # The embeddings, the head and the norms stay as they are, as do the adapters.
    rest = 2 * 64 * 32 + (2 * 3 + 1) * 32
    assert found.eight_bit == found.parameters - found.trainable - rest
