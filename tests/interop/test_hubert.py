"""fairseq's HuBERT and transformers', without fairseq: what is refused, and the way there and back."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import HUBERT

from speechgpt.interop.errors import ConversionError
from speechgpt.interop.hubert import default_layer, from_fairseq, to_fairseq
from speechgpt.interop.hubert_layout import convolutions, from_config, names, to_config
from speechgpt.speech.hubert import scratch

SMALL = HUBERT | {"num_hidden_layers": 2, "mask_time_prob": 0.65}
LAYOUTS: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    "same width": {"hidden_size": 16},
}
NAME = "hubert.pt"


def checkpoint(layout: str = "base", normalize: bool = False) -> dict[str, Any]:
    model = scratch({**SMALL, **LAYOUTS[layout]}, seed=0)
    if layout == "same width":
        with torch.no_grad():
            model.feature_projection.projection.weight.copy_(torch.eye(16))
            model.feature_projection.projection.bias.zero_()
    return to_fairseq(model.eval(), normalize, "encoder")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_there_and_back(layout: str, normalize: bool) -> None:
    before = checkpoint(layout, normalize)
    made = from_fairseq(before, NAME)
    assert made.normalize == normalize
    after = to_fairseq(made.model, made.normalize, "encoder")
    assert after["cfg"] == before["cfg"]
    assert after["model"].keys() == before["model"].keys()
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())


def test_half_precision_becomes_whole() -> None:
    content = checkpoint()
    content["model"] = {name: tensor.half() for name, tensor in content["model"].items()}
    assert {tensor.dtype for tensor in from_fairseq(content, NAME).model.state_dict().values()} == {torch.float32}


def test_flat_arguments_of_older_checkpoints_say_the_same() -> None:
    nested = checkpoint("large", normalize=True)
    flat = {**nested, "cfg": None, "args": {**nested["cfg"]["model"], **nested["cfg"]["task"], "arch": "hubert"}}
    old, new = from_fairseq(flat, NAME), from_fairseq(nested, NAME)
    assert old.normalize is True
    assert old.model.config.to_dict() == new.model.config.to_dict()


def test_the_defaults_are_hubert_base() -> None:
    """SPEC 3.2, and transformers' own defaults, which are those of facebook/hubert-base-ls960."""
    config = to_config({}, NAME)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.feat_extract_norm, config.do_stable_layer_norm) == (3072, "group", False)
    assert (config.conv_dim, config.conv_kernel) == ((512,) * 7, (10, 3, 3, 3, 3, 2, 2))
    assert (config.conv_stride, config.conv_bias) == ((5, 2, 2, 2, 2, 2, 2), False)
    assert (config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups) == (128, 16)
    assert to_config(from_config(config, NAME), NAME).to_dict() == config.to_dict()


def edited(change: Any) -> dict[str, Any]:
    content = copy.deepcopy(checkpoint())
    change(content, content["cfg"]["model"], content["cfg"]["task"], content["model"])
    return content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, m, t, w: w.pop("encoder.layers.1.fc1.bias"), r"missing: encoder\.layers\.1\.fc1\.bias"),
        (lambda c, m, t, w: w.update(surplus=torch.ones(1)), "unexpected: surplus"),
        (lambda c, m, t, w: m.update(encoder_layers=12), "encoder_layers is 12 and the weights have 2"),
        (lambda c, m, t, w: m.update(encoder_layers=10**9), "encoder_layers is 1000000000"),
        (lambda c, m, t, w: m.update(encoder_embed_dim=64), r"is \[32\] where the configuration makes \[64\]"),
        (lambda c, m, t, w: m.update(extractor_mode="layer_norm"), r"missing: feature_extractor\.conv_layers\.0\.2\.1"),
        (lambda c, m, t, w: m.update(conv_bias=True), r"missing: feature_extractor\.conv_layers\.0\.0\.bias"),
        (lambda c, m, t, w: m.update(layer_type="conformer"), "layer_type is 'conformer'"),
        (lambda c, m, t, w: m.update(activation_fn="gelu_fast"), "activation_fn is 'gelu_fast'"),
        (lambda c, m, t, w: m.update(pos_conv_depth=5), "pos_conv_depth is 5"),
        (lambda c, m, t, w: m.update(dropout="0.1"), "dropout is '0.1'"),
        (lambda c, m, t, w: m.update(conv_feature_layers="[(16,10,5)]"), "frames of 10 samples every 5"),
        (lambda c, m, t, w: m.update(conv_feature_layers="__import__('os')"), "conv_feature_layers is"),
        (lambda c, m, t, w: m.update(_name="hubert_ctc"), "the model 'hubert_ctc'"),
        (lambda c, m, t, w: m.update(_name="wav2vec2"), "the model 'wav2vec2'"),
        (lambda c, m, t, w: t.update(sample_rate=8000), "8000 Hz"),
        (lambda c, m, t, w: t.pop("normalize"), "does not say whether input is normalised"),
        (lambda c, m, t, w: c.update(cfg=None), r"neither cfg\.model nor args"),
        (lambda c, m, t, w: w.update(mask_emb=[0.0]), "mask_emb.* is no tensor"),
        (lambda c, m, t, w: c.update(model={f"w2v_encoder.w2v_model.{k}": v for k, v in w.items()}), "fine-tuned"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, reason: str) -> None:
    with pytest.raises(ConversionError, match=f"{NAME}: .*{reason}"):
        from_fairseq(edited(change), NAME)


def test_a_flag_that_contradicts_the_checkpoint_is_refused() -> None:
    with pytest.raises(ConversionError, match="normalize: False, and --normalize was asked for"):
        from_fairseq(checkpoint(), NAME, normalize=True)
    silent = edited(lambda c, m, t, w: t.pop("normalize"))
    assert from_fairseq(silent, NAME, normalize=True).normalize is True


def test_another_size_than_base_needs_its_layer_said() -> None:
    with pytest.raises(ConversionError, match="say --layer, 1 to 2"):
        default_layer(from_fairseq(checkpoint(), NAME).model, NAME)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2),
        ("[(512, 10, 5), (512, 3, 2)]", [(512, 10, 5), (512, 3, 2)]),
    ],
)
def test_convolutions_are_read(text: str, layers: list) -> None:
    assert convolutions(text, NAME) == layers


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "", "[(1,2)]", "[(1,2,3)] * 10**9", "[(1,2,3)] * 65", "[(1,2,-3)]", "[(1,2,3.0)]", "[print(1)]"),
        *("[(512,10,5)] + x", "(" * 300, "[(1,2,3)] if True else []", "[*[1,2,3]]", None, 5),
    ],
)
def test_other_expressions_are_not(text: Any) -> None:
    with pytest.raises(ConversionError, match="conv_feature_layers"):
        convolutions(text, NAME)


def test_every_tensor_of_the_model_has_one_name() -> None:
    for layout in LAYOUTS.values():
        model = scratch({**SMALL, **layout}, seed=0)
        known = names(model.config)
        assert len(set(known.values())) == len(known)
        rest = set(model.state_dict()) - set(known.values())
        projection = {"feature_projection.projection.weight", "feature_projection.projection.bias"}
        assert rest == (projection if layout.get("hidden_size") == 16 else set())
    assert np.isfinite(sum(float(t.sum()) for t in checkpoint()["model"].values()))
