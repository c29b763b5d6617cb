"""What reading a corpus gives: rows, and what is wrong with those that cannot be used."""

from typing import Any, NamedTuple

Row = dict[str, Any]


class ManifestError(ValueError):
    """A manifest or corpus that cannot be used at all; the message names the file and what to do."""


class Problem(NamedTuple):
    """One row that was set aside: `source` is `file:row`, `reason` a stable slug, `detail` for people."""

    source: str
    reason: str
    detail: str


Found = tuple[str, Row | Problem]
"""(`file:row`, the row with the keys of a manifest and a whole address as its `path`, or what is wrong with it)."""
