"""`speechgpt convert`: published checkpoints into this platform's own files, and an encoder back to fairseq's."""

import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from speechgpt.interop.errors import ConversionError
from speechgpt.runtime.progress import Progress


class Kind(StrEnum):
    """What a published file is."""

    hubert = "hubert"
    kmeans = "kmeans"
    vocoder = "vocoder"
    text_to_unit = "text-to-unit"
    language = "language"
    adapter = "adapter"


class Form(StrEnum):
    """Whose files are written."""

    speechgpt = "speechgpt"
    fairseq = "fairseq"


@dataclass
class Converted:
    """What was made of a file, not written yet."""

    kind: str
    write: Callable[[Path], object] = lambda folder: None
    """Writes the files into an empty directory."""
    facts: dict[str, Any] = field(default_factory=dict)


def main(
    source: Annotated[
        Path,
        typer.Argument(
            help="A fairseq HuBERT or text-to-unit .pt, a simple_kmeans joblib file, a CodeHiFiGAN g_*; the directory "
            "of SpeechGPT, LLaMA or LoRA adapter; with --to fairseq, that of a HubertModel."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory to write to; with --to fairseq, the .pt file.")],
    kind: Annotated[Kind | None, typer.Option(help="What SOURCE is.", show_default="told by its content")] = None,
    to: Annotated[Form, typer.Option(help="`fairseq` writes a checkpoint that fairseq 0.12 loads.")] = Form.speechgpt,
    layer: Annotated[
        int | None,
        typer.Option(
            help="hubert: transformer layer that units come from, 1-based.", show_default="11 of a Base model"
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="hubert: whether input is brought to zero mean and unit variance.",
            show_default="as the checkpoint says",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="vocoder: its config.json.", show_default="config.json beside SOURCE")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="kmeans: encoder directory whose features it clusters; its width is checked.",
            show_default="--output, if there is one",
        ),
    ] = None,
    dictionaries: Annotated[
        Path | None,
        typer.Option(
            help="text-to-unit: directory of its dict.*.txt and spm.model.", show_default="SOURCE's, or `binary` in it"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
) -> None:
    """Bring published checkpoints (HuBERT, k-means, vocoder, text-to-unit, SpeechGPT, LoRA) into this platform's files.

    A checkpoint is a pickle, which could run code where it is loaded as its makers do. Here only tensors, arrays and
    plain configuration are taken out of it; a file that asks for anything else is refused, and nothing of it runs.
    """
    progress = Progress(silent=as_json)
    try:
        # Libraries that are imported on the way write to standard output, too.
        with redirect_stdout(sys.stderr):
            progress.say(f"reading {source}")
            if to is Form.fairseq:
                made = _to_fairseq(source, output, kind)
            else:
                made = _from_published(source, output, kind, layer, normalize, config, encoder, dictionaries)
            progress.say(f"writing {output}")
            files = _written(made, output if to is Form.speechgpt else output.parent)
    except ConversionError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or output}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    result = {"kind": made.kind, "output": str(output), "files": files, **made.facts}
    typer.echo(json.dumps(result, indent=2) if as_json else _told(result))


def _from_published(
    source: Path,
    output: Path,
    kind: Kind | None,
    layer: int | None,
    normalize: bool | None,
    config: Path | None,
    encoder: Path | None,
    dictionaries: Path | None,
) -> Converted:
    content: Any = None
    if source.is_dir():
        kind = _kind_of_directory(source, kind)
    else:
        from speechgpt.interop import checkpoints

        content = checkpoints.read(source)
        kind = _kind(content, source, kind)
    for option, value, owner in (
        ("--layer", layer, Kind.hubert),
        ("--normalize/--no-normalize", normalize, Kind.hubert),
        ("--config", config, Kind.vocoder),
        ("--encoder", encoder, Kind.kmeans),
        ("--dictionaries", dictionaries, Kind.text_to_unit),
    ):
        if value is not None and owner is not kind:
            raise typer.BadParameter(f"{option} is for {owner}; {source} is {kind}")
    match kind:
        case Kind.hubert:
            return _hubert(content, source, layer, normalize)
        case Kind.kmeans:
            return _kmeans(content, source, encoder or output, must=encoder is not None)
        case Kind.vocoder:
            return _vocoder(content, source, config or source.parent / "config.json")
        case Kind.text_to_unit:
            return _text_to_unit(content, source, dictionaries or _dictionaries(source.parent))
        case Kind.language:
            from speechgpt.interop.llama import convert_language

            return _model(kind, lambda folder: convert_language(source, folder))
        case Kind.adapter:
            from speechgpt.interop.adapter import convert_adapter

            return _model(kind, lambda folder: convert_adapter(source, folder))


def _kind_of_directory(source: Path, asked: Kind | None) -> Kind:
    if (source / "adapter_config.json").is_file():
        found = Kind.adapter
    elif (source / "config.json").is_file() and "model_type" in _json(source / "config.json", ""):
        found = Kind.language
    else:
        raise ConversionError(
            f"{source}: a directory with neither a model's config.json nor an adapter_config.json; give the checkpoint "
            "file in it"
        )
    if asked not in (None, found):
        raise ConversionError(f"{source}: --kind {asked}, and it holds a {found}")
    return found


def _model(kind: Kind, convert: Callable[[Path], dict[str, Any]]) -> Converted:
    """A model of many gigabytes is not made before it is written; its facts come with the writing."""
    made = Converted(kind)
    made.write = lambda folder: made.facts.update(convert(folder))
    return made


def _kind(content: Any, source: Path, asked: Kind | None) -> Kind:
    from speechgpt.interop import code_hifigan, hubert, kmeans, text_to_unit

    signs: Mapping[Kind, Callable[[Any], bool]] = {
        Kind.text_to_unit: text_to_unit.is_text_to_unit,
        Kind.kmeans: kmeans.is_kmeans,
        Kind.vocoder: code_hifigan.is_generator,
        Kind.hubert: hubert.is_hubert,
    }
    found = next((kind for kind, sign in signs.items() if sign(content)), None)
    if found is None:
        held = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise ConversionError(
            f"{source}: neither of a fairseq HuBERT (`model` with `cfg` or `args`), nor a k-means, nor "
            f"a CodeHiFiGAN (`generator`), nor a text-to-unit Transformer; it holds: {held[:200]}"
        )
    if asked not in (None, found):
        raise ConversionError(f"{source}: --kind {asked}, and its content is {found}")
    return found


def _hubert(content: Any, source: Path, layer: int | None, normalize: bool | None) -> Converted:
    from speechgpt.interop import hubert
    from speechgpt.speech.hubert import save

    made = hubert.from_fairseq(content, str(source), normalize)
    count = made.model.config.num_hidden_layers
    chosen = hubert.default_layer(made.model, str(source)) if layer is None else layer
    if not 1 <= chosen <= count:
        raise typer.BadParameter(f"--layer {chosen}: the model has layers 1 to {count}")
    facts = {
        "layers": count,
        "width": made.model.config.hidden_size,
        "layer": chosen,
        "normalize": made.normalize,
        "left_out": made.left_out,
    }
    return Converted("hubert", lambda folder: save(made.model, folder, layer=chosen, normalize=made.normalize), facts)


def _kmeans(content: Any, source: Path, encoder: Path, must: bool) -> Converted:
    from speechgpt.interop.kmeans import from_sklearn

    codebook = from_sklearn(content, str(source), _width(encoder, must))
    clusters, width = codebook.centroids.shape
    return Converted("kmeans", codebook.save, {"clusters": clusters, "width": width})


def _vocoder(content: Any, source: Path, config: Path) -> Converted:
    from speechgpt.interop.code_hifigan import from_checkpoint

    vocoder = from_checkpoint(content, _json(config, "give the vocoder's own with --config"), str(source), str(config))
    section = vocoder.model.section
    facts = {"units": vocoder.units, "speakers": section.speakers, "durations": section.durations}
    return Converted("vocoder", vocoder.save, facts)


def _dictionaries(folder: Path) -> Path:
    """Where the published model's dictionaries lie: beside it, or in `binary` as its README has it."""
    return folder / "binary" if any((folder / "binary").glob("dict.*.txt")) else folder


def _text_to_unit(content: Any, source: Path, dictionaries: Path) -> Converted:
    from speechgpt.interop.text_to_unit import from_fairseq

    made = from_fairseq(content, str(source), dictionaries)
    model = made.model.config
    facts = {"units": len(made.unit_ids), "class": model.model_type, "width": model.d_model}
    return Converted("text-to-unit", made.save, {**facts, "layers": [model.encoder_layers, model.decoder_layers]})


def _to_fairseq(source: Path, output: Path, kind: Kind | None) -> Converted:
    import torch

    from speechgpt.interop import hubert

    if kind not in (None, Kind.hubert):
        raise typer.BadParameter(f"--to fairseq is for hubert, not {kind}")
    if not source.is_dir():
        raise ConversionError(
            f"{source}: --to fairseq wants the directory of a HubertModel (config.json, model.safetensors)"
        )
    if (said := _json(source / "config.json", "a HubertModel has one").get("model_type")) != "hubert":
        raise ConversionError(f"{source}/config.json: model_type is {said!r:.40}, not hubert")
    model, normalize = hubert.load_directory(source)
    state = hubert.to_fairseq(model, normalize, str(source))
    facts = {"normalize": normalize, "zeros": [name for name in state["model"] if name.startswith("final_proj")]}
    return Converted("hubert", lambda folder: torch.save(state, folder / output.name), facts)


def _width(encoder: Path, must: bool) -> int | None:
    """Dimensions of an encoder directory's features; None where it is not there and need not be."""
    file = encoder / "config.json"
    if not file.is_file() and not must:
        return None
    width = _json(file, "--encoder is the directory of a HubertModel").get("hidden_size")
    if not isinstance(width, int):
        raise ConversionError(f"{file}: no hidden_size: not an encoder's config.json")
    return width


def _json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{file}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{file}: a {type(value).__name__}, not an object of settings")
    return value


def _written(made: Converted, target: Path) -> list[str]:
    """Write beside the directory first, so that it never holds what a reader could take for whole. Gives the files."""
    with _draft(target) as folder:
        made.write(folder)
        names = sorted(file.name for file in folder.iterdir())
        if existing := [name for name in names if (target / name).exists()]:
            raise ConversionError(f"{target / existing[0]}: already there; remove it or choose another --output")
        target.mkdir(parents=True, exist_ok=True)
        # A config.json comes last: without one no reader opens the directory.
        for name in sorted(names, key=lambda name: name == "config.json"):
            (folder / name).rename(target / name)
    return names


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _told(result: Mapping[str, Any]) -> str:
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in result.items()}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())
