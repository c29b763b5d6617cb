"""HuBERT under its two names: fairseq's configuration and tensors, and transformers' (SPEC 3.1 to 3.3)."""

import ast
from collections.abc import Mapping
from typing import Any

from transformers import HubertConfig

from speechgpt.interop.errors import ConversionError

PRETRAINING_ONLY = ("final_proj.", "label_embs_concat", "target_glu.")
"""Names, or their beginnings, of the head that guesses clusters in pre-training; features need none of it."""

# fairseq/models/hubert/hubert.py (0.12.2), HubertConfig: what a configuration that does not say it means.
_DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "layer_norm_first": False,
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "mask_prob": 0.65,
    "mask_length": 10,
    "mask_channel_prob": 0.0,
    "mask_channel_length": 10,
}
_SIZES = (
    *("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
    *("conv_pos", "conv_pos_groups", "mask_length", "mask_channel_length"),
)
_SHARES = (
    *("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input"),
    *("mask_prob", "mask_channel_prob"),
)
_LARGEST = 1 << 16
"""Of any size in a configuration: HuBERT X-Large has 1280 channels, 5120 in its feed-forward part."""
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}
_NORMS = {"default": "group", "layer_norm": "layer"}


def to_config(model: Mapping[str, Any], where: str) -> HubertConfig:
    """transformers' configuration of fairseq's `cfg.model` (or the model's part of an older `args`).

    Raises ConversionError naming the key whose value is none, or means a model that transformers does not have.
    """
    said = {name: model.get(name, default) for name, default in _DEFAULTS.items()}
    for name in _SIZES:
        if not isinstance(said[name], int) or not 1 <= said[name] <= _LARGEST:
            raise ConversionError(
                f"{where}: {name} is {said[name]!r:.40}; a whole number from 1 to {_LARGEST} is needed"
            )
    for name in _SHARES:
        if not isinstance(said[name], int | float) or not 0 <= said[name] <= 1:
            raise ConversionError(f"{where}: {name} is {said[name]!r:.40}; a share from 0 to 1 is needed")
    _one_of(where, "layer_type", said["layer_type"], {"transformer": ""})
    if model.get("pos_conv_depth", 1) != 1:
        raise ConversionError(f"{where}: pos_conv_depth is {model['pos_conv_depth']!r:.40}; HuBERT's is 1")
    layers = convolutions(said["conv_feature_layers"], where)
    return HubertConfig(
        hidden_size=said["encoder_embed_dim"],
        num_hidden_layers=said["encoder_layers"],
        num_attention_heads=said["encoder_attention_heads"],
        intermediate_size=said["encoder_ffn_embed_dim"],
        hidden_act=_one_of(where, "activation_fn", said["activation_fn"], _ACTIVATIONS),
        hidden_dropout=said["dropout"],
        attention_dropout=said["attention_dropout"],
        activation_dropout=said["activation_dropout"],
        feat_proj_dropout=said["dropout_input"],
        layerdrop=said["encoder_layerdrop"],
        feat_extract_norm=_one_of(where, "extractor_mode", said["extractor_mode"], _NORMS),
        feat_proj_layer_norm=True,
        do_stable_layer_norm=bool(said["layer_norm_first"]),
        conv_dim=tuple(dimensions for dimensions, _, _ in layers),
        conv_kernel=tuple(kernel for _, kernel, _ in layers),
        conv_stride=tuple(stride for _, _, stride in layers),
        conv_bias=bool(said["conv_bias"]),
        num_conv_pos_embeddings=said["conv_pos"],
        num_conv_pos_embedding_groups=said["conv_pos_groups"],
        # Without a share to mask there is no `masked_spec_embed`, and a checkpoint always has one.
        mask_time_prob=said["mask_prob"] or 0.05,
        mask_time_length=said["mask_length"],
        mask_feature_prob=said["mask_channel_prob"],
        mask_feature_length=said["mask_channel_length"],
    )


def from_config(config: HubertConfig, where: str) -> dict[str, Any]:
    """fairseq's `cfg.model` of a transformers configuration. Raises ConversionError for what fairseq does not have."""
    if not config.feat_proj_layer_norm or getattr(config, "conv_pos_batch_norm", False):
        raise ConversionError(
            f"{where}: feat_proj_layer_norm false or conv_pos_batch_norm true: fairseq 0.12 has neither"
        )
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    norms = {theirs: ours for ours, theirs in _NORMS.items()}
    layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    return {
        "_name": "hubert",
        "label_rate": 50.0,
        "extractor_mode": _one_of(where, "feat_extract_norm", config.feat_extract_norm, norms),
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": _one_of(where, "hidden_act", config.hidden_act, activations),
        "layer_type": "transformer",
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "encoder_layerdrop": config.layerdrop,
        "dropout_input": config.feat_proj_dropout,
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_feature_layers": str(layers),
        "conv_bias": config.conv_bias,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "mask_prob": config.mask_time_prob,
        "mask_length": config.mask_time_length,
        "mask_channel_prob": config.mask_feature_prob,
        "mask_channel_length": config.mask_feature_length,
        "final_dim": 256,
        "untie_final_proj": True,
    }


def names(config: HubertConfig) -> dict[str, str]:
    """{fairseq's name: transformers' name} of every tensor of the model (SPEC 3.3).

    fairseq leaves `post_extract_proj` out where the convolutions are as wide as the encoder.
    """
    found = {"mask_emb": "masked_spec_embed"}

    def both(fairseq: str, transformers: str, bias: bool = True) -> None:
        for tensor in ("weight", "bias") if bias else ("weight",):
            found[f"{fairseq}.{tensor}"] = f"{transformers}.{tensor}"

    for n in range(len(config.conv_dim)):
        layer = f"feature_extractor.conv_layers.{n}"
        both(f"{layer}.0", f"{layer}.conv", bias=config.conv_bias)
        if config.feat_extract_norm == "layer":
            both(f"{layer}.2.1", f"{layer}.layer_norm")
        elif n == 0:
            both(f"{layer}.2", f"{layer}.layer_norm")
    both("layer_norm", "feature_projection.layer_norm")
    if config.conv_dim[-1] != config.hidden_size:
        both("post_extract_proj", "feature_projection.projection")
    position = "encoder.pos_conv_embed.conv"
    found["encoder.pos_conv.0.bias"] = f"{position}.bias"
    found["encoder.pos_conv.0.weight_g"] = f"{position}.parametrizations.weight.original0"
    found["encoder.pos_conv.0.weight_v"] = f"{position}.parametrizations.weight.original1"
    both("encoder.layer_norm", "encoder.layer_norm")
    for n in range(config.num_hidden_layers):
        layer = f"encoder.layers.{n}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            both(f"{layer}.self_attn.{projection}", f"{layer}.attention.{projection}")
        both(f"{layer}.self_attn_layer_norm", f"{layer}.layer_norm")
        both(f"{layer}.fc1", f"{layer}.feed_forward.intermediate_dense")
        both(f"{layer}.fc2", f"{layer}.feed_forward.output_dense")
        both(f"{layer}.final_layer_norm", f"{layer}.final_layer_norm")
    return found


def convolutions(text: Any, where: str) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each layer, from `"[(512,10,5)] + [(512,3,2)]*4"`, which is read, not evaluated."""
    message = f"{where}: conv_feature_layers is {text!r:.80}; a list such as [(512,10,5)] + [(512,3,2)]*4 is needed"
    if not isinstance(text, str) or len(text) > 1000:
        raise ConversionError(message)
    try:
        layers = _listed(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ConversionError(message) from None
    if not layers:
        raise ConversionError(message)
    return layers


def _listed(node: ast.expr) -> list[tuple[int, int, int]]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _listed(left) + _listed(right)
        case ast.BinOp(left=ast.List() as left, op=ast.Mult(), right=ast.Constant(value=int(times))) if times <= 64:
            return _listed(left) * times
        case ast.List(elts=elements):
            return [_layer(element) for element in elements]
    raise ValueError


def _layer(node: ast.expr) -> tuple[int, int, int]:
    channels, kernel, stride = ast.literal_eval(node)
    if not all(isinstance(size, int) and 1 <= size <= _LARGEST for size in (channels, kernel, stride)):
        raise ValueError
    return channels, kernel, stride


def _one_of(where: str, name: str, value: Any, known: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ConversionError(f"{where}: {name} is {value!r:.40}; this is done for {', '.join(known)} only")
    return known[value]
