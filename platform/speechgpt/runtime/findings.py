"""What an examination finds: one line a subject, with what to do about it."""

from dataclasses import dataclass
from typing import Literal

Grade = Literal["ok", "note", "missing"]
"""`note`: works without, or works less well; `missing`: required."""


@dataclass(frozen=True)
class Finding:
    subject: str
    grade: Grade
    found: str
    remedy: str = ""
