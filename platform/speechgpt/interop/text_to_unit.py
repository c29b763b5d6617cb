"""A text-to-unit model of fairseq's (a `TransformerModel`, SPEC 2.2) into one of transformers'.

Which class computes what fairseq does depends on how the model was built:

    norms      positions             layernorm_embedding   class
    after      sinusoidal            no                    FSMT
    before     sinusoidal            no                    M2M100
    after      learned, sinusoidal   yes                   BART
    before     learned, sinusoidal   yes                   mBART

Sinusoidal positions of the last two are written out as the learned ones that those classes have.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
)

from speechgpt.interop.checkpoints import plain
from speechgpt.interop.errors import ConversionError
from speechgpt.language.text_to_unit import SentencePieceText, TextToUnit

_BOS, _PAD, _EOS, _UNK = 0, 1, 2, 3
_SPECIALS = 4
"""`<s> <pad> </s> <unk>`, which fairseq's dictionary puts before the lines of its file."""
_NOT_WEIGHTS = re.compile(
    r".*version|.*embed_positions\._float_tensor"
    # Copies that fairseq 0.12 keeps for a faster encoder, and makes anew from the others whenever it loads a model.
    r"|encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)"
)
_OVERWRITE = "#fairseq:overwrite"


def is_text_to_unit(content: Any) -> bool:
    """Whether a checkpoint is of an encoder-decoder Transformer."""
    weights = content.get("model") if isinstance(content, dict) else None
    return isinstance(weights, dict) and "decoder.layers.0.encoder_attn.q_proj.weight" in weights


def from_fairseq(content: Mapping[str, Any], where: str, dictionaries: Path) -> TextToUnit:
    """The model with its alphabets. dictionaries: directory with `dict.SOURCE.txt`, `dict.TARGET.txt` and (or
    the one above it) `spm.model`.

    content: what `checkpoints.read` gives. where: the file's name, for errors. Raises ConversionError for a kind of
    model that is not here, for weights that are not the configuration's, and for a file that is missing.
    """
    model, task = _configuration(content, where)
    weights = _weights(content["model"], where)
    source, target = (
        _dictionary(dictionaries / f"dict.{task.get(side) or default}.txt")
        for side, default in (("source_lang", "en"), ("target_lang", "unit"))
    )
    spm = _beside(dictionaries if (dictionaries / "spm.model").is_file() else dictionaries.parent, "spm.model")
    for side, size in (("encoder", len(source)), ("decoder", len(target))):
        if (rows := len(weights[f"{side}.embed_tokens.weight"])) != size + _SPECIALS:
            raise ConversionError(
                f"{where}: the {side} has {rows} tokens, and the dictionary in {dictionaries} {size} and {_SPECIALS} "
                "special ones: they do not belong together"
            )
    made = _model(model, weights, where)
    text = SentencePieceText(spm, source, _UNK)
    return TextToUnit(made.eval(), text, _unit_ids(target, dictionaries), "written")


def _configuration(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's settings and the task's: new checkpoints have both in `cfg`, old ones together in `args`."""
    said = plain(content.get("cfg"))
    if isinstance(said, dict) and isinstance(said.get("model"), dict):
        task = said.get("task")
        return said["model"], task if isinstance(task, dict) else {}
    said = plain(content.get("args"))
    if not isinstance(said, dict):
        raise ConversionError(f"{where}: neither cfg nor args: the model's settings are not in it")
    return said, said


def _weights(state: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in state.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{where}: model[{name!r:.60}] is no tensor")
        weights[name] = tensor.float()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if name not in weights:
            raise ConversionError(f"{where}: no {name}: adaptive or shared inputs are not here")
    return weights


def _model(said: Mapping[str, Any], weights: dict[str, torch.Tensor], where: str) -> Any:
    for name in ("adaptive_softmax_cutoff", "adaptive_input", "no_token_positional_embeddings", "no_cross_attention"):
        if said.get(name):
            raise ConversionError(f"{where}: {name} = {said[name]!r:.40}: a model of that kind is not here")
    before = bool(said.get("encoder_normalize_before"))
    if before != bool(said.get("decoder_normalize_before")):
        raise ConversionError(f"{where}: encoder and decoder normalise at different places, which no class here does")
    normed = "encoder.layernorm_embedding.weight" in weights
    learned = "encoder.embed_positions.weight" in weights
    if learned and not normed:
        raise ConversionError(f"{where}: learned positions without layernorm_embedding, which no class here has")
    embeddings = {side: weights[f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")}
    output = weights.pop("decoder.output_projection.weight", embeddings["decoder"])
    shared = all(torch.equal(embeddings["encoder"], other) for other in (embeddings["decoder"], output))
    if not shared and (before or normed):
        raise ConversionError(
            f"{where}: embeddings that are not shared (share_all_embeddings), which no class here has"
        )
    settings = _settings(said, weights, where)
    if normed:
        if not learned:
            _write_positions(weights, settings["max_position_embeddings"])
        made: Any = (
            MBartForConditionalGeneration(MBartConfig(**settings, vocab_size=len(output)))
            if before
            else BartForConditionalGeneration(BartConfig(**settings, vocab_size=len(output)))
        )
    elif before:
        made = M2M100ForConditionalGeneration(M2M100Config(**settings, vocab_size=len(output)))
    else:
        sizes: dict[str, Any] = {"src_vocab_size": len(embeddings["encoder"]), "tgt_vocab_size": len(output)}
        made = FSMTForConditionalGeneration(
            FSMTConfig(**settings, **sizes, tie_word_embeddings=shared, langs=["text", "unit"])
        )
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    if isinstance(made, FSMTForConditionalGeneration):
        named["model.decoder.output_projection.weight"] = output
    else:
        named |= {"model.shared.weight": output, "lm_head.weight": output}
    _fill(made, named, where)
    made.generation_config.forced_eos_token_id = None
    return made


def _settings(said: Mapping[str, Any], weights: Mapping[str, torch.Tensor], where: str) -> dict[str, Any]:
    def number(name: str) -> int:
        if not isinstance(value := said.get(name), int) or value < 1:
            raise ConversionError(f"{where}: {name} is {value!r:.40}, not a number")
        return value

    layers = {
        side: 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(f"{side}.layers."))
        for side in ("encoder", "decoder")
    }
    positions = min(int(said.get(f"max_{side}_positions") or 1024) for side in ("source", "target"))
    if "encoder.embed_positions.weight" in weights:
        positions = len(weights["encoder.embed_positions.weight"]) - _PAD - 1
    return {
        "d_model": weights["encoder.embed_tokens.weight"].shape[1],
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "encoder_attention_heads": number("encoder_attention_heads"),
        "decoder_attention_heads": number("decoder_attention_heads"),
        "encoder_ffn_dim": len(weights["encoder.layers.0.fc1.weight"]),
        "decoder_ffn_dim": len(weights["decoder.layers.0.fc1.weight"]),
        "activation_function": str(said.get("activation_fn") or "relu"),
        "scale_embedding": not said.get("no_scale_embedding"),
        "dropout": float(said.get("dropout") or 0.0),
        "max_position_embeddings": positions,
        "bos_token_id": _BOS,
        "pad_token_id": _PAD,
        "eos_token_id": _EOS,
        "decoder_start_token_id": _EOS,
        "forced_eos_token_id": None,
    }


def _write_positions(weights: dict[str, torch.Tensor], positions: int) -> None:
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding

    width = weights["encoder.embed_tokens.weight"].shape[1]
    table = M2M100SinusoidalPositionalEmbedding.get_embedding(positions + _PAD + 1, width, _PAD)
    for side in ("encoder", "decoder"):
        weights[f"{side}.embed_positions.weight"] = table.clone()


def _fill(made: Any, named: dict[str, torch.Tensor], where: str) -> None:
    """Load the weights; what the class has and the checkpoint has not may only be what follows from the rest."""
    expected = {name: tensor.shape for name, tensor in made.state_dict().items()}
    strange = sorted(set(named) - set(expected))
    absent = sorted(
        name
        for name in set(expected) - set(named)
        if not name.endswith(("embed_positions.weight", "embed_positions.weights", "final_logits_bias"))
    )
    if strange or absent:
        raise ConversionError(
            f"{where}: weights that the model has no place for: {strange[:3]}; places without weights: {absent[:3]}"
        )
    for name, tensor in named.items():
        if tensor.shape != expected[name]:
            raise ConversionError(f"{where}: {name} is {list(tensor.shape)}; {list(expected[name])} was expected")
    made.load_state_dict(named, strict=False)
    made.tie_weights()


def _dictionary(file: Path) -> dict[str, int]:
    """{token: number} of a dictionary file, one `token count` a line."""
    try:
        lines = _beside(file.parent, file.name).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file}: not UTF-8: {error}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines):
        token, space, count = line.removesuffix(_OVERWRITE).rstrip().rpartition(" ")
        if not space or not count.isdecimal():
            raise ConversionError(f"{file}, line {number + 1}: `token count` is expected")
        found[token] = number + _SPECIALS
    return found


def _unit_ids(target: Mapping[str, int], where: Path) -> tuple[int, ...]:
    count = 0
    while f"<{count}>" in target:
        count += 1
    others = sum(name.startswith("<") and name[1:-1].isdecimal() and name.endswith(">") for name in target)
    if not count or others != count:
        raise ConversionError(
            f"{where}: the target dictionary has {others} units, and not <0> to <{max(others - 1, 0)}>, each once"
        )
    return tuple(target[f"<{unit}>"] for unit in range(count))


def _beside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ConversionError(
            f"{folder / name}: no such file; --dictionaries names the directory of the model's dict.*.txt and spm.model"
        )
    return folder / name
