"""What files and fields are called in corpora."""

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


def is_sound(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SOUNDS


def split_of(name: str | None) -> str | None:
    """`train-clean-100` -> `train`; `dev.tsv`'s stem -> `dev`; None for a name that is no split's."""
    for split in ("train", "dev", "test", "valid", "eval"):
        if name and name.lower().startswith(split) and not name[len(split) : len(split) + 1].isalpha():
            return split
    return "valid" if name == "validation" else None


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
