"""A language model's shape from its configuration: parameters, products a token, what a layer keeps for backward.

Everything is built on torch's meta device, where tensors have shapes and no storage.
"""

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from speechgpt.training.config import LoraSection
from speechgpt.training.engine import element_count
from speechgpt.training.starting import add_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ATTENTION = "shape_only"


class Products(NamedTuple):
    """Weights that a token is multiplied with; `trained` are those among them that get a gradient.

    The head stands apart because only targets pass through it.
    """

    body: int
    body_trained: int
    head: int
    head_trained: int

    def flops(self, tokens: float, targets: float) -> float:
        """Floating-point operations of training on `tokens`, of which `targets` are predicted: two a product and pass.

        The forward pass and the gradient of the activations take every weight, the gradient of the weights only those
        that are trained. Attention's own products, some percent at our lengths, are left out.
        """
        body, head = 4 * self.body + 2 * self.body_trained, 4 * self.head + 2 * self.head_trained
        return tokens * body + targets * head


class Shape(NamedTuple):
    parameters: int
    trainable: int
    largest_layer: int
    """Parameters of the largest single module, which ZeRO-3 gathers whole."""
    layers: int
    hidden: int
    rows: int
    """Of the head: the vocabulary with its padding."""
    products: Products
    eight_bit: int = 0
    """Of the parameters, those that are held in eight bits: the frozen linear layers under `lora.base: int8`."""


class Kept(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass."""

    layer: int
    """Of one decoder layer."""
    inputs: int
    """Of one decoder layer's input, all that gradient checkpointing keeps of it."""
    rest: int
    """Of what is not in a layer: embeddings, the final norm, masks, rotations."""

    def total(self, layers: int, checkpointing: bool) -> int:
        if checkpointing:
            return layers * self.inputs + self.layer + self.rest
        return layers * self.layer + self.rest


def measure(config: PretrainedConfig, lora: LoraSection | None) -> Shape:
    model = _on_meta(config, lora, torch.float32)
    parameters = list(model.parameters())
    modules = model.modules()
    found = products(model)
    return Shape(
        parameters=sum(map(element_count, parameters)),
        trainable=sum(element_count(parameter) for parameter in parameters if parameter.requires_grad),
        largest_layer=max(sum(map(element_count, module.parameters(recurse=False))) for module in modules),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        rows=config.vocab_size,
        products=found,
        # bitsandbytes leaves the head as it is.
        eight_bit=found.body - found.body_trained if lora and lora.base == "int8" else 0,
    )


def products(model: "PreTrainedModel | PeftModel | nn.Module") -> Products:
    """Of a model on any device, under ZeRO-3, too."""
    causal: Any = model
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    counts = {"body": 0, "body_trained": 0, "head": 0, "head_trained": 0}
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        part = "head" if module is head else "body"
        size = element_count(module.weight)
        counts[part] += size
        counts[f"{part}_trained"] += size if module.weight.requires_grad else 0
    return Products(**counts)


def kept(
    config: PretrainedConfig,
    lora: LoraSection | None,
    precision: torch.dtype,
    micro_batch: int,
    block: int,
    *,
    masked: bool,
) -> Kept:
    """What a forward pass over [micro_batch, block] tokens keeps, from the difference between one layer and two.

    masked: whether rows are kept apart by a mask, which attention row by row (`row_attention`) does without.
    """
    one, two = (_kept_by(config, layers, lora, precision, micro_batch, block) for layers in (1, 2))
    size = precision.itemsize
    mask = micro_batch * block * block if masked else 0
    # Each layer brings it to its own precision.
    layer = two - one + mask * size
    return Kept(layer, micro_batch * block * config.hidden_size * size, 2 * one - two + mask)


def _kept_by(
    config: PretrainedConfig, layers: int, lora: LoraSection | None, precision: torch.dtype, batch: int, block: int
) -> int:
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = layers
    if getattr(fewer, "layer_types", None):
        fewer.layer_types = fewer.layer_types[:layers]
    model = _on_meta(fewer, lora, precision)
    causal: Any = model.get_base_model() if lora else model
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(batch, block, dtype=torch.long, device="meta")
    positions = torch.arange(block, device="meta").expand(batch, block)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until it is counted: a storage that is freed would lend its address to the next.
        hidden = causal.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        total = sum(storages.values())
    del hidden
    return total


def _on_meta(config: PretrainedConfig, lora: LoraSection | None, precision: torch.dtype) -> Any:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation=_ATTENTION)
        model.train()
        return add_lora(model, lora, "", seed=0) if lora else model


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention keeps: its inputs, its output and one number a row, never [block, block]."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = torch.empty_like(query)
        context.save_for_backward(query, key, value, attended, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return attended

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("shapes have no gradient")


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """query, key, value: [batch, heads, block, head size]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # As sdpa in transformers does it.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None
