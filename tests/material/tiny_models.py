"""Models that are small enough to be made in a test, and their settings as transformers' configurations take them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechgpt.recipe import load
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import hubert
from speechgpt.speech.codebook import Codebook

LLAMA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
HUBERT = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
HUBERT_LAYOUTS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
"""What distinguishes HuBERT Base from HuBERT Large but for size."""


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def add_encoder(place: Workspace) -> None:
    """The encoder and codebook of the recipe `tiny`, of random weights, the same each time."""
    with place.stage("encoder") as target:
        hubert.save(hubert.scratch(load("tiny").encoder.architecture, seed=1), target, layer=2, normalize=True)
        Codebook(torch.randn(32, 64, generator=torch.Generator().manual_seed(1))).save(target)
