"""What files and fields are called in corpora."""

import posixpath
import re
from pathlib import PurePosixPath
from typing import Any

SOUNDS = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".aiff", ".aif", ".au", ".caf", ".w64")
)

_FIELDS = {
    "text": ("text", "transcription", "transcript", "sentence", "normalized_text"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk"),
    "language": ("language", "lang", "locale"),
    "split": ("split",),
    "id": ("id", "utterance_id", "utt_id"),
}


_SPLITS = {
    "train": "train", "training": "train", "dev": "dev", "development": "dev", "valid": "valid", "validation": "valid",
    "val": "valid", "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval", "heldout": "heldout",
    "held": "heldout",
}  # fmt: skip
_WORD = re.compile(r"[a-z]+")


def is_sound(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SOUNDS


def below(top: str, name: str) -> str:
    """A file's place in the corpus `top`; its own name if it is the corpus."""
    return posixpath.basename(name) if name == top else name.removeprefix(f"{top}/")


def split_of(name: str | None) -> str | None:
    """`train-clean-100` -> `train`; `validation-0-of-1.parquet` -> `valid`; None for a name that is no split's."""
    first = _WORD.match(name.lower()) if name else None
    return _SPLITS.get(first[0]) if first else None


def fields(given: dict[str, Any]) -> dict[str, Any]:
    """A row's fields under the names that manifests have; fields of other names are kept.

    Numbers that name a speaker or an utterance become text. A `subset` is a split where it has a split's name: others,
    such as XL, are sizes.
    """
    row = dict(given)
    for name, others in _FIELDS.items():
        for other in others:
            value = given.get(other)
            if value is None:
                continue
            row.pop(other, None)
            row[name] = str(value) if isinstance(value, int) and name != "text" else value
            break
    subset = row.get("subset")
    if "split" not in row and isinstance(subset, str) and split_of(subset):
        row["split"] = row.pop("subset")
    if "seconds" not in row and isinstance(row.get("duration"), int | float):
        row["seconds"] = float(row.pop("duration"))
    return row
