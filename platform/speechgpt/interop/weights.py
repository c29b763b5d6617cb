"""The tensors of a checkpoint directory: one file or shards with an index, safetensors or what `torch.save` wrote."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from speechgpt.interop import checkpoints
from speechgpt.interop.errors import ConversionError

SHARD_BYTES = 5 << 30
"""Tensors in one file, as transformers writes them."""


def find(directory: Path, names: Iterable[str]) -> list[Path]:
    """The files that hold a checkpoint's tensors: the first of `names` that is there, whole or as an index of shards.

    names: `pytorch_model.bin`, say, whose shards `pytorch_model.bin.index.json` lists. Raises ConversionError naming
    what is missing.
    """
    names = list(names)
    if not directory.is_dir():
        raise ConversionError(f"{directory}: no such directory")
    for name in names:
        if (file := directory / name).is_file():
            return [file]
        if (index := directory / f"{name}.index.json").is_file():
            shards = [directory / shard for shard in sorted(set(_weight_map(index).values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise ConversionError(
                    f"{index} names {len(shards)} shards, of which {', '.join(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} missing: fetch them into the same directory"
                )
            return shards
    raise ConversionError(f"{directory}: no weights: none of {', '.join(names)} is there, nor an index of shards")


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, by name. Raises ConversionError for a file that is damaged or holds anything else.

    Those of a `.bin` are views of the file, so that a tensor is read when it is written.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ConversionError(f"{file}: not safetensors, or damaged ({error}): fetch it again") from None
    tensors = checkpoints.read(file)
    if not isinstance(tensors, dict):
        raise ConversionError(f"{file}: names with tensors are expected; it holds a {type(tensors).__name__}")
    if odd := [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        held = type(tensors[odd[0]]).__name__
        raise ConversionError(f"{file}: names with tensors are expected; {odd[0]!r} holds a {held}")
    return tensors


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """{name: shape} over all files. Raises ConversionError for a tensor that two of them hold."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, tensor in read(file).items():
            if name in found:
                raise ConversionError(f"{file}: {name} is in another shard, too")
            found[name] = tuple(tensor.shape)
    return found


def compare(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises ConversionError naming the first tensors that are missing, unknown or of another shape."""
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in found]
    unknown = [f"{name} is not part of such a model" for name in found if name not in expected]
    if problems := wrong + missing + unknown:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConversionError(f"{what}: {'; '.join(problems[:3])}{more}")


def write(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Write `model.safetensors`, or shards of at most SHARD_BYTES and their index, a shard in memory at a time."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    total = 0

    def close(shard: dict[str, torch.Tensor]) -> None:
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))

    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            close(shard)
            shard, held = {}, 0
        shard[name] = tensor.contiguous()
        held, total = held + size, total + size
    close(shard)
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError for a file that is missing or holds something else."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{file} is missing") from None
    except ValueError as error:
        raise ConversionError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{file}: a JSON object is expected, not {type(value).__name__}")
    return value


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to write into that becomes `target` when all went well. Raises ConversionError if that is taken."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists and is not empty: choose another target, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        yield draft
        if target.is_dir():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ConversionError(f"{index}: no weight_map of tensor names to files")
    if outside := [shard for shard in names.values() if Path(shard).name != shard]:
        raise ConversionError(f"{index}: names a file outside its directory: {outside[0]!r}")
    return names
