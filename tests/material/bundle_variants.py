"""Bundles made from another one: as good with other weights, slower, or bad in the ways that a promotion must stand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from speechgpt.runtime import bundle
from speechgpt.speech.vocoder import UnitVocoder, Vocoder

PARTS = ("encoder", "language", "vocoder")


def remade(source: Path, directory: Path, change: Callable[[Path], None]) -> Path:
    """`source` with its parts changed, sealed anew in `directory`: its hashes hold, whatever is in it."""
    scratch = directory.with_name(f"{directory.name}-parts")
    for part in PARTS:
        shutil.copytree(source / part, scratch / part)
    change(scratch)
    directory.mkdir(parents=True)
    units = bundle.load(source).manifest["unit_vocabulary"]
    bundle.write(directory, {part: scratch / part for part in PARTS}, units, {"made from": source.name})
    return directory


def voice(seed: int, clusters: int = 0) -> Callable[[Path], None]:
    """Another vocoder, of as many units or of `clusters`."""

    def change(parts: Path) -> None:
        was = Vocoder.load(parts / "vocoder")
        torch.manual_seed(seed)
        Vocoder(UnitVocoder(was.model.section, clusters or was.units)).save(parts / "vocoder")

    return change


def not_a_number(parts: Path, *, every: bool = False) -> None:
    """One weight of the language model, or every one of a tensor."""
    file = parts / "language" / "model.safetensors"
    tensors = load_file(file)
    weights = tensors["model.norm.weight"]
    weights[: len(weights) if every else 1] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def short_winded(parts: Path) -> None:
    """A language model that breaks beyond the tokens of the warm-up, which reads "hello" and makes four more: what
    divides its positions from there on is 0."""
    from speechgpt.language.model import SpeechLanguageModel

    model = SpeechLanguageModel.load(parts / "language")
    file = parts / "language" / "config.json"
    config = json.loads(file.read_text())
    pairs = config["hidden_size"] // config["num_attention_heads"] // 2
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * pairs,
        "long_factor": [0.0] * pairs,
        "original_max_position_embeddings": len(model.vocabulary.encode_prompt(model.prompts.speaking("hello"))) + 16,
    }
    file.write_text(json.dumps(config))


def laboured(layers: int) -> Callable[[Path], None]:
    """So many layers more, which add nothing to what goes through them: the same answers, later."""

    def change(parts: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        was = LlamaForCausalLM.from_pretrained(parts / "language")
        shape = {**was.config.to_dict(), "num_hidden_layers": was.config.num_hidden_layers + layers}
        shape.pop("layer_types", None)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        model.load_state_dict(was.state_dict(), strict=False)
        with torch.no_grad():
            for layer in model.model.layers[was.config.num_hidden_layers :]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        model.save_pretrained(parts / "language")

    return change


def damage(directory: Path) -> None:
    """One bit of the vocoder."""
    file = directory / "vocoder" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
