"""What files and fields are called in corpora."""

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
    "split": ("split", "subset"),
    "id": ("id", "utterance_id", "utt_id"),
}


_SPLIT = re.compile(r"(train|dev|test|valid|eval)(?:(?<=valid)ation)?(?![a-z])")


def is_sound(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SOUNDS


def split_of(name: str | None) -> str | None:
    """`train-clean-100` -> `train`; `validation-0-of-1.parquet` -> `valid`; None for a name that is no split's."""
    found = _SPLIT.match(name.lower()) if name else None
    return found[1] if found else None


def fields(given: dict[str, Any]) -> dict[str, Any]:
    """A row's fields under the names that manifests have; fields of other names are kept.

    Numbers that name a speaker or an utterance become text.
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
    if "seconds" not in row and isinstance(row.get("duration"), int | float):
        row["seconds"] = float(row.pop("duration"))
    return row
