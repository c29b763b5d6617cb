"""A served bundle from parts that were made or converted one by one.

Parts are directories of our layout, as training, `publish` or `convert` leave them; the encoder may also be a Hugging
Face HubertModel, whose layer is then to be given.
"""

import json as json_module
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speechgpt.interop.errors import ConversionError

if TYPE_CHECKING:
    from speechgpt.runtime.bundle import Bundle

_FROM_HIDDEN = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.lora_A\.weight$")
"""Matrices that read the model's hidden state, whose width is theirs."""


@dataclass(frozen=True)
class Parts:
    """Where the parts are. codebook: None for the one in the encoder's directory. layer: None for what the encoder's
    `unit_config.json` says."""

    encoder: Path
    language: Path
    vocoder: Path
    codebook: Path | None = None
    adapter: Path | None = None
    layer: int | None = None
    named: Mapping[str, Path] = field(default_factory=dict)
    """Further adapters, by the name under which requests ask for them."""


def main(
    encoder: Annotated[Path, typer.Option(help="HuBERT: our layout, or a Hugging Face HubertModel.")],
    language: Annotated[Path, typer.Option(help="Language model with its unit vocabulary.")],
    vocoder: Annotated[Path, typer.Option(help="Unit vocoder.")],
    output: Annotated[Path, typer.Option(help="Directory to make; must be empty or not there.")],
    codebook: Annotated[
        Path | None, typer.Option(help="kmeans.safetensors or its directory; else the encoder's own.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter of the language model.")] = None,
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Add the adapter into the weights instead of stacking it.")
    ] = False,
    named: Annotated[
        list[str] | None,
        typer.Option("--named-adapter", help="NAME=DIRECTORY: one that requests ask for as the model NAME."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer of a Hugging Face encoder whose output the codebook is of, 1-based.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
) -> None:
    """Put encoder, codebook, language model, adapter and vocoder together as one bundle that can be served."""
    from rich.console import Console

    from speechgpt.runtime.bundle import BundleError
    from speechgpt.speech.codebook import CodebookError
    from speechgpt.speech.vocoder import VocoderError

    console = Console(stderr=True)
    if merge_adapter and adapter is None:
        raise typer.BadParameter("needs --adapter", param_hint="--merge-adapter")
    parts = Parts(encoder, language, vocoder, codebook, adapter, layer, dict(map(_named, named or ())))
    try:
        with console.status("checking and copying the parts"):
            bundle, figures = assemble(parts, output, merge_adapter)
    except (ConversionError, BundleError, CodebookError, VocoderError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    result = {"bundle": str(output), "digest": bundle.digest, **figures}
    if json:
        typer.echo(json_module.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        typer.echo(f"{name:<18}{value}")
    console.print(f"serve it: speechgpt serve {output}", markup=False, soft_wrap=True)


def assemble(parts: Parts, output: Path, merge_adapter: bool = False) -> "tuple[Bundle, dict[str, Any]]":
    """Write the bundle to `output`, which appears whole or not at all; its figures beside it.

    Raises ConversionError for parts that do not fit each other, naming both, or whatever a part's own reader raises
    (CodebookError, VocoderError, BundleError).
    """
    from speechgpt.interop.weights import appearing
    from speechgpt.language.vocabulary import Vocabulary
    from speechgpt.runtime import bundle
    from speechgpt.runtime.tracking import revision
    from speechgpt.speech.encoder import SpeechEncoder
    from speechgpt.speech.vocoder import Vocoder

    for path in (parts.encoder, parts.language, parts.vocoder, parts.adapter, *parts.named.values()):
        if path is not None and not path.is_dir():
            raise ConversionError(f"{path}: no such directory")
    for name in ("config.json", "tokenizer.json"):
        # Of a directory without them transformers would make some tokenizer or other.
        if not (parts.language / name).is_file():
            raise ConversionError(
                f"language model {parts.language}: no {name}; take a published model through `speechgpt convert` first"
            )
    try:
        vocabulary = Vocabulary.load(parts.language)
    except (OSError, ValueError) as error:
        raise ConversionError(f"language model {parts.language}: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"encoder": Path(folder, "encoder"), "language": parts.language, "vocoder": parts.vocoder}
        _encoder(parts, chosen["encoder"])
        encoder = SpeechEncoder.load(chosen["encoder"])
        _check_units(
            {
                f"codebook {parts.codebook or parts.encoder}": encoder.clusters,
                f"language model {parts.language}": vocabulary.unit_count,
                f"vocoder {parts.vocoder}": Vocoder.load(parts.vocoder).units,
            }
        )
        if parts.adapter is not None:
            _check_adapter(parts.adapter, parts.language)
            if merge_adapter:
                chosen["language"] = Path(folder, "language")
                _merge(parts.language, parts.adapter, chosen["language"])
            else:
                chosen["adapter"] = parts.adapter
        for name, path in parts.named.items():
            _check_adapter(path, parts.language)
            chosen[f"{bundle.ADAPTERS}/{name}"] = path
        units = {
            "name": encoder.name,
            "size": encoder.clusters,
            "frames_per_second": 50,
            "merged": vocabulary.merged,
        }
        made_of = {
            name: str(getattr(parts, name)) for name in ("encoder", "codebook", "language", "adapter", "vocoder")
        }
        made_of |= {f"adapter {name}": str(path) for name, path in parts.named.items()}
        lineage = {"revision": revision(), "assembled_from": {k: v for k, v in made_of.items() if v != "None"}}
        with appearing(output) as draft:
            made = bundle.write(draft, chosen, units, lineage)
    adapted = "none" if parts.adapter is None else "merged" if merge_adapter else "stacked"
    figures = {"units": encoder.clusters, "markers": vocabulary.markers, "adapter": adapted}
    return made, {**figures, **({"named_adapters": ", ".join(sorted(parts.named))} if parts.named else {})}


def _named(option: str) -> tuple[str, Path]:
    name, given, path = option.partition("=")
    if not (name and given and path):
        raise typer.BadParameter(f"{option!r}: NAME=DIRECTORY is expected", param_hint="--named-adapter")
    return name, Path(path)


def _encoder(parts: Parts, folder: Path) -> None:
    """The bundle's encoder directory: the model, its layer, its front end, its codebook."""
    from transformers import HubertModel

    from speechgpt.interop.weights import read_json
    from speechgpt.speech import codebook, hubert

    config = read_json(parts.encoder / "config.json")
    if config.get("model_type") != "hubert":
        raise ConversionError(
            f"encoder {parts.encoder}: config.json is of a {config.get('model_type')!r} model; a HuBERT is expected"
        )
    front = read_json(parts.encoder / "preprocessor_config.json")
    if not isinstance(front.get("do_normalize"), bool):
        raise ConversionError(
            f"{parts.encoder / 'preprocessor_config.json'}: do_normalize must say whether clips are normalised "
            "(mHuBERT Base: false); a wrong answer shifts every unit"
        )
    ours = parts.encoder / hubert.UNIT_CONFIG
    said = read_json(ours).get("layer") if ours.is_file() else None
    layer = said if parts.layer is None else parts.layer
    if layer is None:
        raise ConversionError(
            f"encoder {parts.encoder}: no {hubert.UNIT_CONFIG}, so give --layer (mHuBERT's published units: 11)"
        )
    if not (parts.encoder / "model.safetensors").is_file():
        raise ConversionError(
            f"encoder {parts.encoder}: no model.safetensors; other formats are pickles, take them through "
            "`speechgpt convert` first"
        )
    folder.mkdir()
    if layer == said:
        for name in ("config.json", "model.safetensors", "preprocessor_config.json", hubert.UNIT_CONFIG):
            shutil.copy(parts.encoder / name, folder / name)
    else:
        model = HubertModel.from_pretrained(parts.encoder, local_files_only=True)
        count = model.config.num_hidden_layers
        if not 1 <= layer <= count:
            raise ConversionError(f"encoder {parts.encoder}: layer {layer}; the model has layers 1 to {count}")
        hubert.save(model, folder, layer=layer, normalize=front["do_normalize"])
    source = parts.codebook or parts.encoder
    if source.name != codebook.FILE and not source.is_dir():
        raise ConversionError(
            f"codebook {source}: {codebook.FILE} or a directory that holds it is expected; take other formats through "
            "`speechgpt convert` first"
        )
    book = codebook.Codebook.load(source if source.is_dir() else source.parent)
    if book.centroids.shape[1] != config["hidden_size"]:
        raise ConversionError(
            f"codebook {source} has {book.centroids.shape[1]} dimensions, encoder {parts.encoder} "
            f"{config['hidden_size']}: the codebook was fitted on another encoder"
        )
    book.save(folder)


def _check_units(counts: dict[str, int]) -> None:
    """Raises ConversionError naming two parts that count units differently."""
    (first, expected), *others = counts.items()
    for name, count in others:
        if count != expected:
            raise ConversionError(f"{first} has {expected} units, {name} {count}: they were not made for each other")


def _check_adapter(adapter: Path, language: Path) -> None:
    """Raises ConversionError when the adapter's matrices are not those of this model, or not for all of its layers."""
    from safetensors import safe_open

    from speechgpt.interop.weights import read_json

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ConversionError(
            f"adapter {adapter}: no {file.name}; take other formats through `speechgpt convert` first"
        )
    config = read_json(language / "config.json")
    hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    found = set()
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            found.add(name.partition(".layers.")[2].partition(".")[0])
            width = tensors.get_slice(name).get_shape()[1]
            if _FROM_HIDDEN.search(name) and width != hidden:
                raise ConversionError(
                    f"adapter {adapter} is for a model of width {width}, language model {language} has {hidden}"
                )
    if found != {str(number) for number in range(layers or 0)}:
        raise ConversionError(
            f"adapter {adapter} is for a model of {len(found)} layers, language model {language} has {layers}"
        )


def _merge(language: Path, adapter: Path, folder: Path) -> None:
    """The model with the adapter added into its weights; tokenizer and prompt format stay the model's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(language, dtype="auto", local_files_only=True)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    shutil.copytree(language, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    merged.save_pretrained(folder)
