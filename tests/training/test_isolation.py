"""Packing is not seen by the model: rows in a block have the loss and the gradient that they have alone."""

import numpy as np
import pytest
import torch
from tiny_models import LLAMA
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from speechgpt.training.blocks import Batch
from speechgpt.training.config import LoraSection
from speechgpt.training.objective import Objective
from speechgpt.training.packing import Block, pack
from speechgpt.training.starting import add_lora

BLOCK = 48
# A row of one token, of two, one that fills its block to the last token, and blocks with more and less padding.
LENGTHS = [[11, 1, 20], [5, 9, 2, 6], [48], [30, 18], [3]]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False)),
}


def fresh(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    # Small random weights attend to everything alike, and then a leak changes little.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


def row(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, 64, length), rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)


def batch(blocks: list[Block]) -> Batch:
    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(block, name) for block in blocks]))

    return Batch(stacked("ids").long(), stacked("weights"), stacked("positions").long())


def rows_of_blocks() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    seeds = iter(range(100))
    return [[row(length, next(seeds)) for length in lengths] for lengths in LENGTHS]


def together(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    return batch([pack(part, BLOCK, pad_id=0) for part in rows])


def gradient(model: PreTrainedModel, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    objective = Objective(model, first_unit=40, unit_count=20)
    loss = 0.0
    for one in batches:
        weighted = objective(one).weighted
        if weighted.requires_grad:
            weighted.backward()
        loss += weighted.item()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two gradients, in lengths of the first."""
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((difference / sum(tensor.double().square().sum() for tensor in one.values())).sqrt())


@pytest.mark.parametrize("attention", ["sdpa_by_rows", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_loss_and_gradient_they_have_alone(name, attention):
    model, rows = fresh(name, attention), rows_of_blocks()
    alone = [batch([pack([one], len(one[0]), pad_id=0)]) for part in rows for one in part if len(one[0]) > 1]
    loss, expected = gradient(model, alone)
    packed_loss, packed = gradient(model, [together(rows)])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert apart(expected, packed) < 1e-5
    # Rows that see each other are a thousand times as far away.
    leaking_loss, leaking = gradient(model, [running_on(together(rows))])
    assert leaking_loss != pytest.approx(loss, rel=1e-3)
    assert apart(expected, leaking) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_it_holds_with_activation_checkpointing_and_lora(checkpointing, lora):
    def model() -> PreTrainedModel:
        made = fresh("llama", "sdpa_by_rows").train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            made = add_lora(made, LoraSection(rank=2, alpha=4, dropout=0.0), "crossmodal", seed=1)
            for adapter in (p for n, p in made.named_parameters() if "lora_B" in n):
                torch.nn.init.normal_(adapter, generator=torch.Generator().manual_seed(2))
        return made

    made, rows = model(), rows_of_blocks()
    alone = [batch([pack([one], len(one[0]), pad_id=0)]) for part in rows for one in part if len(one[0]) > 1]
    loss, expected = gradient(made, alone)
    packed_loss, packed = gradient(made, [together(rows)])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert apart(expected, packed) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa_by_rows", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_no_row_sees_what_stands_in_another(name, attention):
    model, rows = fresh(name, attention).eval(), rows_of_blocks()

    def hidden(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> torch.Tensor:
        asked = together(rows)
        with torch.no_grad():
            return model.get_decoder()(
                input_ids=asked.ids, position_ids=asked.positions, use_cache=False
            ).last_hidden_state

    before = hidden(rows)
    # Another first row in each of the first two blocks.
    for place in (0, 1):
        ids, weights = rows[place][0]
        rows[place][0] = (67 - ids) % 64, weights
    after = hidden(rows)
    for place in (0, 1):
        first = LENGTHS[place][0]
        assert torch.equal(before[place, first:], after[place, first:])
        assert not torch.allclose(before[place, :first], after[place, :first], atol=1e-2)
    assert torch.equal(before[2:], after[2:])


def running_on(packed: Batch) -> Batch:
    return packed._replace(positions=torch.arange(BLOCK).expand_as(packed.positions))
