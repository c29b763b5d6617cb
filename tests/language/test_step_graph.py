"""The graph of a step is the model's step to the last bit, or is not used."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from speechgpt.language.step_graph import Step, traced
from speechgpt.speech.packed_products import exchange_linears

SHAPE = torch.Size([0, 2, 0, 16])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ALIKE = {"vocab_size": 300, "intermediate_size": 64, "max_position_embeddings": 512, "head_dim": 16, "pad_token_id": 0}


def small(kind, **changed):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SIZES, **ALIKE, **changed)
    return AutoModelForCausalLM.from_config(config).eval()


def states(rows, positions):
    return [torch.randn(rows, 2, positions, 16) for _ in range(2)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_a_graph_gives_the_models_own_bits_for_shapes_it_never_saw(kind):
    model = small(kind)
    graph = traced(model, [SHAPE, SHAPE], 512)
    assert graph is not None
    for rows, positions in ((1, 1), (1, 511), (4, 33), (11, 129)):
        ids, at = torch.randint(300, (rows, 1)), torch.randint(positions, (rows, 1))
        keys, values = states(rows, positions), states(rows, positions)
        own = copy.deepcopy((keys, values))
        assert torch.equal(graph(ids, at, keys, values), Step(model)(ids, at, *own))
        # The token's own keys and values are where the next step looks for them.
        assert all(map(torch.equal, [*keys, *values], [*own[0], *own[1]]))


def test_a_model_that_looks_at_its_shapes_is_run_without(caplog):
    class Moody(torch.nn.Module):
        """Which layers it takes, depends on how many rows there are."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.dtype = inner, inner.dtype
            self.get_input_embeddings = inner.get_input_embeddings

        def forward(self, input_ids, **others):
            made = self.inner(input_ids=input_ids, **others)
            made.logits = made.logits * (2 if len(input_ids) > 4 else 1)
            return made

    with caplog.at_level("INFO"):
        assert traced(Moody(small("llama")), [SHAPE, SHAPE], 512) is None
    assert "another result for 5 rows of 300 positions" in caplog.text


def test_a_model_that_has_no_graph_is_run_without(caplog):
    class Asking(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.dtype = inner.dtype
            self.get_input_embeddings = inner.get_input_embeddings

        def forward(self, **_):
            raise NotImplementedError("no such cache")

    with caplog.at_level("INFO"):
        assert traced(Asking(small("llama")), [SHAPE, SHAPE], 512) is None
    assert "no such cache" in caplog.text


@torch.no_grad()
def test_a_graph_of_packed_weights_gives_the_models_own_bits():
    model = small("llama")
    exchange_linears(model)
    graph = traced(model, [SHAPE, SHAPE], 512)
    assert graph is not None
    ids, at = torch.randint(300, (4, 1)), torch.randint(33, (4, 1))
    keys, values = states(4, 33), states(4, 33)
    assert torch.equal(graph(ids, at, keys, values), Step(model)(ids, at, *copy.deepcopy((keys, values))))
