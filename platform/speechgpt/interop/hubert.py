"""A fairseq HuBERT checkpoint into the encoder directory that everything here reads, and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HubertConfig, HubertModel

from speechgpt.interop.checkpoints import plain
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.hubert_layout import PRETRAINING_ONLY, from_config, names, to_config
from speechgpt.speech.audio import FRAME, MIN_SAMPLES, SAMPLE_RATE
from speechgpt.speech.hubert import receptive_field

BASE_LAYERS, BASE_LAYER = 12, 11
"""The layer of a Base model that SpeechGPT's units come from (SPEC 2.1)."""

_WEIGHT_NORM_NAMES = {
    "encoder.pos_conv.0.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv.0.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
}


class Encoder(NamedTuple):
    """What a checkpoint holds of an encoder."""

    model: HubertModel
    normalize: bool
    left_out: list[str]
    """Tensors of the checkpoint that features do not need."""


def is_hubert(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("model"), dict) and bool({"cfg", "args"} & set(content))


def from_fairseq(content: Mapping[str, Any], where: str, normalize: bool | None = None) -> Encoder:
    """The encoder in a checkpoint that fairseq's trainer saved (SPEC 3.1), as float32.

    content: what `checkpoints.read` gives. where: the file's name, for errors. normalize: in place of what the
    checkpoint says of its front end, or where it says nothing. Raises ConversionError naming missing, unexpected and
    misshapen tensors, and configuration that the weights or this platform's 20 ms frames contradict.
    """
    model_settings, task_settings = _settings(content, where)
    weights = _tensors(content["model"], where)
    if fine_tuned := [name for name in weights if name.startswith(("w2v_encoder.", "encoder.w2v_model."))]:
        raise ConversionError(
            f"{where}: a HuBERT fine-tuned for recognition ({fine_tuned[0]}, …); give the pre-trained checkpoint that "
            "it was made from"
        )
    _check_frames(model_settings, task_settings, where)
    config = to_config(model_settings, where)
    _check_layers(weights, config, where)
    known = names(config)
    left_out = [name for name in weights if name.startswith(PRETRAINING_ONLY)]
    _check_names(set(known), set(weights) - set(left_out), where)
    with torch.device("meta"):
        model = HubertModel(config)
    converted = {known[name]: tensor.float() for name, tensor in weights.items() if name in known}
    if config.conv_dim[-1] == config.hidden_size:
        converted["feature_projection.projection.weight"] = torch.eye(config.hidden_size)
        converted["feature_projection.projection.bias"] = torch.zeros(config.hidden_size)
    _check_shapes({name: tensor.shape for name, tensor in model.state_dict().items()}, converted, known, where)
    model.load_state_dict(converted, assign=True)
    return Encoder(model.eval(), _normalize(task_settings, normalize, where), left_out)


def to_fairseq(model: HubertModel, normalize: bool, where: str) -> dict[str, Any]:
    """A checkpoint that fairseq 0.12 loads (`checkpoint_utils.load_model_ensemble_and_task`) and `from_fairseq` reads.

    The pre-training head is not in transformers' model: its projection is zeros, its dictionary None.
    """
    settings = from_config(model.config, where)
    state = model.state_dict()
    known = names(model.config)
    if missing := [theirs for theirs in known.values() if theirs not in state and theirs != "masked_spec_embed"]:
        raise ConversionError(f"{where}: the model lacks {', '.join(missing[:4])}")
    weights = {ours: state[theirs].detach().clone() for ours, theirs in known.items() if theirs in state}
    width = model.config.hidden_size
    if model.config.conv_dim[-1] == width and not torch.equal(
        state["feature_projection.projection.weight"], torch.eye(width)
    ):
        raise ConversionError(f"{where}: fairseq has no projection between convolutions and encoder of the same width")
    weights.setdefault("mask_emb", torch.zeros(width))
    weights["final_proj.weight"] = torch.zeros(settings["final_dim"], width)
    weights["final_proj.bias"] = torch.zeros(settings["final_dim"])
    task = {
        "_name": "hubert_pretraining",
        "data": "",
        "labels": ["km"],
        "label_rate": 50.0,
        "sample_rate": SAMPLE_RATE,
        "normalize": normalize,
    }
    return {
        "args": None,
        "cfg": {"common": {}, "model": settings, "task": task},
        "model": weights,
        "task_state": {"dictionaries": [None]},
        "extra_state": {"epoch": 0, "train_iterator": {"epoch": 0}},
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}
        ],
        "last_optimizer_state": None,
    }


def default_layer(model: HubertModel, where: str) -> int:
    """The layer to take units from where nobody says. Raises ConversionError for another size than Base."""
    count = model.config.num_hidden_layers
    if count == BASE_LAYERS:
        return BASE_LAYER
    raise ConversionError(
        f"{where}: say --layer, 1 to {count}: the layer that the k-means was fitted on. {BASE_LAYER} is what "
        f"SpeechGPT takes of HuBERT Base, and this model has not its {BASE_LAYERS} layers but {count}"
    )


def load_directory(directory: str | os.PathLike) -> tuple[HubertModel, bool]:
    """A Hugging Face HubertModel directory, whole, and whether its input is normalised."""
    import json

    directory = Path(directory)
    model = HubertModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    try:
        normalize = json.loads((directory / "preprocessor_config.json").read_text())["do_normalize"]
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(
            f"{directory}/preprocessor_config.json: {error!r}; do_normalize says whether input is normalised"
        ) from None
    return model.eval(), bool(normalize)


def _settings(content: Mapping[str, Any], where: str) -> tuple[dict, dict]:
    """(model's, task's) configuration: nested in `cfg`, or all in the flat `args` of older checkpoints."""
    try:
        cfg, args = plain(content.get("cfg")), plain(content.get("args"))
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        model, task = cfg["model"], cfg.get("task")
        name = model.get("_name", "hubert")
    elif isinstance(args, dict):
        model = task = args
        name = args.get("arch", "hubert")
    else:
        raise ConversionError(f"{where}: neither cfg.model nor args says how the model is built")
    if not isinstance(name, str) or not name.startswith("hubert") or "ctc" in name or "seq2seq" in name:
        raise ConversionError(f"{where}: a checkpoint of the model {name!r:.60}, not of hubert")
    return model, task if isinstance(task, dict) else {}


def _tensors(model: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    if strange := [name for name, value in model.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{where}: model[{strange[0]!r:.60}] is no tensor")
    return {_WEIGHT_NORM_NAMES.get(name, name): tensor for name, tensor in model.items()}


def _normalize(task: Mapping[str, Any], asked: bool | None, where: str) -> bool:
    said = task.get("normalize")
    if asked is not None:
        if isinstance(said, bool) and said != asked:
            raise ConversionError(
                f"{where}: its task says normalize: {said}, and --{'' if asked else 'no-'}normalize was asked for; the "
                "wrong one shifts units"
            )
        return asked
    if not isinstance(said, bool):
        raise ConversionError(
            f"{where}: its task does not say whether input is normalised; say --no-normalize (HuBERT Base, mHuBERT) or "
            "--normalize (HuBERT Large)"
        )
    return said


def _check_frames(model: Mapping[str, Any], task: Mapping[str, Any], where: str) -> None:
    if (rate := task.get("sample_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise ConversionError(f"{where}: sample_rate is {rate!r:.20} Hz; units are made from {SAMPLE_RATE} Hz")
    config = to_config(model, where)
    hop = 1
    for stride in config.conv_stride:
        hop *= stride
    if (hop, receptive_field(config)) != (FRAME, MIN_SAMPLES):
        raise ConversionError(
            f"{where}: conv_feature_layers make frames of {receptive_field(config)} samples every {hop}; units are "
            f"frames of {MIN_SAMPLES} every {FRAME} (20 ms)"
        )


def _check_layers(weights: Mapping[str, torch.Tensor], config: HubertConfig, where: str) -> None:
    """Before anything is built: a configuration may claim any number."""
    held = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    if len(held) != config.num_hidden_layers:
        raise ConversionError(
            f"{where}: encoder_layers is {config.num_hidden_layers} and the weights have {len(held)} layers"
        )


def _check_names(expected: set[str], found: set[str], where: str) -> None:
    complaints = []
    for word, which in (("missing", expected - found), ("unexpected", found - expected)):
        if which:
            shown = sorted(which)
            rest = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
            complaints.append(f"{word}: {', '.join(shown[:6])}{rest}")
    if complaints:
        raise ConversionError(f"{where}: its configuration does not match its weights; {'; '.join(complaints)}")


def _check_shapes(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor], known: Mapping[str, str], where: str
) -> None:
    ours = {theirs: name for name, theirs in known.items()}
    wrong = [
        f"{ours[name]} is {list(found[name].shape)} where the configuration makes {list(shape)}"
        for name, shape in expected.items()
        if name in ours and found[name].shape != shape
    ]
    if wrong:
        rest = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConversionError(f"{where}: its configuration does not match its weights: {'; '.join(wrong[:3])}{rest}")
