"""A CodeHiFiGAN generator (`g_*`) with its config.json into a vocoder directory (SPEC 4.1 to 4.3).

Two programs write them: speech-resynthesis, and fairseq's speech-to-speech examples, which load the same files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from speechgpt.interop.errors import ConversionError
from speechgpt.speech.audio import FRAME, SAMPLE_RATE
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.vocoder import UnitVocoder, Vocoder, fold_weight_norm

MODEL_IN_DIM = {"fairseq": 80, "speech-resynthesis": 128}
"""What each program takes for a `model_in_dim` that config.json does not name."""

_SPEAKERS = 200
"""`num_speakers` where config.json is silent, in both programs."""
_LARGEST = 1 << 16
_NEEDED = (
    *("num_embeddings", "embedding_dim", "upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel"),
    *("resblock_kernel_sizes", "resblock_dilation_sizes"),
)


def is_generator(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("generator"), dict)


def from_checkpoint(content: Mapping[str, Any], config: Mapping[str, Any], where: str, config_name: str) -> Vocoder:
    """The vocoder, weight norm folded.

    content: what `checkpoints.read` gives; config: config.json. where, config_name: the files' names, for errors.
    Raises ConversionError for a kind of vocoder that is not here (f0, d-vectors, another hop), and where weights and
    config do not match.
    """
    _check_kind(config, content["generator"], config_name)
    weights = _folded(content["generator"], where)
    section = _section(config, weights, where, config_name)
    with torch.device("meta"):
        model = UnitVocoder(section, _number(config, "num_embeddings", config_name))
    fold_weight_norm(model)
    renamed = {_ours(name): tensor.float() for name, tensor in weights.items()}
    _check(
        {name: tensor.shape for name, tensor in model.state_dict().items()},
        renamed,
        f"{config_name} does not match {where}",
    )
    model.load_state_dict(renamed, assign=True)
    return Vocoder(model)


def _check_kind(config: Mapping[str, Any], weights: Mapping[str, Any], where: str) -> None:
    if config.get("f0") or config.get("f0_quant_num_bin") or "f0_quant_embed.weight" in weights:
        raise ConversionError(
            f"{where}: f0: a vocoder that is told the pitch, which units do not carry; take one trained without f0"
        )
    if config.get("embedder_params") or ("spkr.weight" in weights and "spkr.bias" in weights):
        raise ConversionError(
            f"{where}: embedder_params: a vocoder that takes voices as d-vectors of another model; take one with "
            "numbered speakers (multispkr without embedder_params)"
        )
    if str(config.get("resblock", "1")) != "1":
        raise ConversionError(f"{where}: resblock is {config['resblock']!r:.20}; only the published kind 1 is here")
    for name, wanted in (("sampling_rate", SAMPLE_RATE), ("code_hop_size", FRAME)):
        if (said := config.get(name, wanted)) != wanted:
            raise ConversionError(
                f"{where}: {name} is {said!r:.20}; units here are {FRAME} samples at {SAMPLE_RATE} Hz"
            )


def _folded(generator: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The state dict with every weight-normalised pair exchanged for its weight: g v / |v|."""
    if strange := [name for name, value in generator.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{where}: generator[{strange[0]!r:.60}] is no tensor")
    folded = {}
    for name, tensor in generator.items():
        stem, _, last = name.rpartition(".")
        if last == "weight_g":
            direction = generator.get(f"{stem}.weight_v")
            if direction is None or direction.shape[0] != tensor.shape[0] or tensor.numel() != tensor.shape[0]:
                raise ConversionError(f"{where}: {name} has no weight_v of its shape beside it")
            length = direction.float().flatten(1).norm(dim=1).view_as(tensor)
            folded[f"{stem}.weight"] = direction.float() * (tensor.float() / length)
        elif last == "weight_v":
            if f"{stem}.weight_g" not in generator:
                raise ConversionError(f"{where}: {name} has no weight_g beside it")
        else:
            folded[name] = tensor
    return folded


def _section(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], where: str, config_name: str
) -> GeneratorSection:
    if missing := [name for name in _NEEDED if name not in config]:
        raise ConversionError(f"{config_name}: {', '.join(missing)} missing; is it the config.json of this vocoder?")
    embedding = _number(config, "embedding_dim", config_name)
    predictor = config.get("dur_predictor_params")
    if predictor:
        _check_predictor(predictor, embedding, config_name)
    speakers = _number(config, "num_speakers", config_name, _SPEAKERS) if config.get("multispkr") else 0
    try:
        return GeneratorSection(
            embedding_dim=embedding,
            model_in_dim=_model_in_dim(config, weights, where, config_name),
            upsample_rates=config["upsample_rates"],
            upsample_kernel_sizes=config["upsample_kernel_sizes"],
            upsample_initial_channel=_number(config, "upsample_initial_channel", config_name),
            resblock_kernel_sizes=config["resblock_kernel_sizes"],
            resblock_dilation_sizes=config["resblock_dilation_sizes"],
            speakers=speakers,
            durations=bool(predictor),
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConversionError(f"{config_name}: {f'{key}: ' if key else ''}{first['msg']}") from None


def _check_predictor(params: Any, embedding: int, where: str) -> None:
    wanted = {"encoder_embed_dim": embedding, "var_pred_hidden_dim": embedding, "var_pred_kernel_size": 3}
    for name, value in wanted.items():
        said = params.get(name) if isinstance(params, dict) else None
        if said != value:
            raise ConversionError(
                f"{where}: dur_predictor_params.{name} is {said!r:.20}; {value} goes with embedding_dim {embedding}"
            )


def _model_in_dim(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], where: str, config_name: str) -> int:
    first = weights.get("conv_pre.weight")
    if first is None or first.dim() != 3:
        raise ConversionError(f"{where}: no conv_pre.weight: not a CodeHiFiGAN generator")
    width = first.shape[1]
    if "model_in_dim" in config:
        if (said := _number(config, "model_in_dim", config_name)) != width:
            raise ConversionError(
                f"{config_name} does not match {where}: model_in_dim is {said}, and the weights take {width} channels"
            )
    elif width not in MODEL_IN_DIM.values():
        meant = " and ".join(f"{name} takes {value}" for name, value in MODEL_IN_DIM.items())
        raise ConversionError(
            f"{config_name}: no model_in_dim, for which {meant}; the weights in {where} take {width} channels. Write "
            f'"model_in_dim": {width} if these files belong together'
        )
    return width


def _number(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ConversionError(f"{where}: {name} is {value!r:.40}; a whole number from 1 to {_LARGEST} is needed")
    return value


def _ours(name: str) -> str:
    """The generator's own layers lie one level deeper here, beside the embeddings and the duration predictor."""
    return name if name.startswith(("dict.", "spkr.", "dur_predictor.")) else f"generator.{name}"


def _check(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor], what: str) -> None:
    complaints = [
        *(f"missing {name}" for name in expected if name not in found),
        *(f"unexpected {name}" for name in found if name not in expected),
        *(
            f"{name} is {list(found[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ),
    ]
    if complaints:
        shown = [complaint.replace(" generator.", " ").removeprefix("generator.") for complaint in complaints]
        rest = f", and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise ConversionError(f"{what}: {'; '.join(shown[:4])}{rest}")
