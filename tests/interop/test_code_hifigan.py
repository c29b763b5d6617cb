"""Published generators into vocoders: what is taken, and what is refused with the reason."""

from typing import Any

import numpy as np
import pytest
import torch

from speechgpt.interop.code_hifigan import from_checkpoint
from speechgpt.interop.errors import ConversionError
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.vocoder import UnitVocoder, Vocoder, VocoderError

CONFIG: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "num_embeddings": 20,
    "embedding_dim": 8,
    "model_in_dim": 8,
    "code_hop_size": 320,
    "f0": False,
    "sampling_rate": 16000,
}
PREDICTOR = {"encoder_embed_dim": 8, "var_pred_hidden_dim": 8, "var_pred_kernel_size": 3, "var_pred_dropout": 0.5}


def section(**changed: Any) -> GeneratorSection:
    fields = {key: CONFIG[key] for key in CONFIG if key in GeneratorSection.model_fields}
    return GeneratorSection(**{**fields, "durations": False, **changed})


def generator(**changed: Any) -> dict[str, Any]:
    """A checkpoint of random weights in the published names, weight norm apart as `weight_g` and `weight_v`."""
    torch.manual_seed(0)
    state = UnitVocoder(section(**changed), 20).state_dict()
    parts = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = {}
    for name, tensor in state.items():
        name = name.removeprefix("generator.")
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        # Fresh weights are so short that no sound comes through.
        weights[name] = torch.full_like(tensor, 0.9) if name.endswith("weight_g") else tensor
    return {"generator": weights}


def converted(config: dict[str, Any], **changed: Any) -> Vocoder:
    return from_checkpoint(generator(**changed), config, "g_00000010", "config.json")


def test_without_a_predictor_a_unit_is_a_frame() -> None:
    vocoder = converted(CONFIG)
    (sound,) = vocoder.synthesize([[3, 3, 7]])
    assert len(sound) == 3 * 320
    np.testing.assert_allclose(sound, vocoder.synthesize([[3, 7]], durations=[[2, 1]])[0], atol=1e-6)
    with pytest.raises(VocoderError, match="does not predict durations"):
        vocoder.durations([[3]])


def test_with_a_predictor_and_speakers() -> None:
    config = {**CONFIG, "dur_predictor_params": PREDICTOR, "multispkr": "_", "num_speakers": 3, "model_in_dim": 16}
    vocoder = converted(config, durations=True, speakers=3, model_in_dim=16)
    assert vocoder.durations([[1, 2]])[0].min() >= 1
    one, two = (vocoder.synthesize([[1, 2]], speaker)[0] for speaker in (0, 2))
    assert np.abs(one - two).max() > 1e-4


def test_speakers_are_two_hundred_where_config_does_not_say() -> None:
    config = {**CONFIG, "multispkr": "single", "model_in_dim": 16}
    assert converted(config, speakers=200, model_in_dim=16).model.section.speakers == 200


def test_weights_that_were_folded_already_are_taken() -> None:
    content = generator()
    before = from_checkpoint(content, CONFIG, "g", "c").model.state_dict()
    folded = {name.removeprefix("generator."): tensor for name, tensor in before.items()}
    after = from_checkpoint({"generator": folded}, CONFIG, "g", "c").model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("width", [80, 128])
def test_a_missing_model_in_dim_is_what_either_program_takes(width: int) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "model_in_dim"} | {"embedding_dim": width}
    assert converted(config, embedding_dim=width, model_in_dim=width).model.section.model_in_dim == width


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key != name}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (without("model_in_dim"), r"fairseq takes 80 and speech-resynthesis takes 128; the weights in g take 8"),
        ({**CONFIG, "model_in_dim": 128}, "model_in_dim is 128, and the weights take 8"),
        ({**CONFIG, "f0": True}, "f0: a vocoder that is told the pitch"),
        ({**CONFIG, "f0_quant_num_bin": 20}, "f0: "),
        ({**CONFIG, "embedder_params": {"x": 1}}, "embedder_params"),
        ({**CONFIG, "resblock": "2"}, "resblock is '2'"),
        ({**CONFIG, "sampling_rate": 22050}, "sampling_rate is 22050"),
        ({**CONFIG, "code_hop_size": 640}, "code_hop_size is 640"),
        ({**CONFIG, "upsample_rates": [5, 4, 4, 2, 4]}, "multiply to 640"),
        (without("upsample_rates"), "upsample_rates missing"),
        ({**CONFIG, "num_embeddings": 1000}, r"dict\.weight is \[20, 8\], not \[1000, 8\]"),
        ({**CONFIG, "num_embeddings": "20"}, "num_embeddings is '20'"),
        ({**CONFIG, "num_embeddings": 10**12}, "num_embeddings is 1000000000000"),
        ({**CONFIG, "dur_predictor_params": PREDICTOR}, r"missing dur_predictor\.conv1"),
        ({**CONFIG, "dur_predictor_params": {**PREDICTOR, "var_pred_hidden_dim": 64}}, "var_pred_hidden_dim is 64"),
        ({**CONFIG, "multispkr": "_", "model_in_dim": 8}, "model_in_dim must be 16"),
        ({**CONFIG, "resblock_kernel_sizes": [3, 11]}, r"convs1\.0\.weight is"),
        ({**CONFIG, "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}, "missing"),
    ],
)
def test_what_does_not_fit_is_named(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        from_checkpoint(generator(), config, "g", "config.json")


def test_weights_that_are_not_whole_are_named() -> None:
    content = generator()
    del content["generator"]["conv_pre.weight_v"]
    with pytest.raises(ConversionError, match=r"conv_pre\.weight_g has no weight_v"):
        from_checkpoint(content, CONFIG, "g", "c")
