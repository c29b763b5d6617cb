"""Lhotse: cuts in `.jsonl` or `.jsonl.gz`."""

import gzip
import json
import posixpath
import zlib
from collections.abc import Iterator
from typing import Any

from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem, Row
from speechgpt.runtime.files import FileFact, joined, open_local
from speechgpt.runtime.inside_files import Stretch

_HARMLESS = ("Resample",)
"""Changes of a recording after which it is the same sound."""


def lhotse(top: str, files: list[FileFact], sounds: str = "") -> Iterator[Found]:
    """A cut a row: its stretch of the recording, the text of its supervisions, the speaker if there is one.

    sounds: the directory that relative paths of recordings start from; empty, that of the cuts' file.
    """
    lists = [file.uri for file in files if file.uri.endswith((".jsonl", ".jsonl.gz"))]
    if not lists:
        raise ManifestError(f"{top}: a Lhotse file of cuts (.jsonl or .jsonl.gz) is expected")
    for file in lists:
        for where, line in _lines(file):
            yield where, line if isinstance(line, Problem) else _cut(where, line, sounds or posixpath.dirname(file))


class _Unsupported(ValueError):
    """A cut that is one, and whose sound is no stretch of a file."""


def _cut(where: str, line: bytes, sounds: str) -> Row | Problem:
    try:
        cut = json.loads(line)
        kind = cut.get("type", "MonoCut")
        if kind not in ("MonoCut", "MultiCut"):
            return Problem(where, "unsupported_cut", f"{kind}: only cuts of one recording are read")
        recording = cut.get("recording")
        if not recording:
            return Problem(where, "missing_key", "recording: the cut has none (features alone cannot become units)")
        row = {"id": cut["id"], "path": _address(cut, recording, sounds), "seconds": float(cut["duration"])}
    except _Unsupported as error:
        return Problem(where, "unsupported_cut", f"{cut.get('id')}: {error}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return Problem(where, "unreadable_row", f"not a cut: {type(error).__name__} {error}")
    told = [s for s in cut.get("supervisions") or [] if isinstance(s, dict)]
    row["text"] = " ".join(s["text"] for s in told if s.get("text")) or None
    for key in ("speaker", "language"):
        values = {s[key] for s in told if s.get(key)}
        row[key] = values.pop() if len(values) == 1 else None
    return row


def _address(cut: dict[str, Any], recording: dict[str, Any], sounds: str) -> str:
    """With a fragment, unless the cut is the whole of its file. Raises _Unsupported."""
    changes = [change["name"] for change in recording.get("transforms") or [] if change["name"] not in _HARMLESS]
    if changes:
        raise _Unsupported(f"its recording is changed by {', '.join(changes)}, and the file holds what was before that")
    source, channel = _source(cut, recording)
    if source["type"] not in ("file", "url"):
        raise _Unsupported(f"a recording of type {source['type']!r} is no file")
    whole = joined(sounds, source["source"])
    start, duration = float(cut["start"]), float(cut["duration"])
    if start == 0 and channel is None and abs(duration - float(recording["duration"])) < 1e-3:
        return whole
    return whole + str(Stretch(start, start + duration, channel))


def _source(cut: dict[str, Any], recording: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The file with the cut's channels, and the place of the only one among the file's; None: all that it has."""
    given = cut.get("channel", 0)
    wanted = [given] if isinstance(given, int) else sorted(given)
    for source in recording["sources"]:
        has = source.get("channels") or recording.get("channel_ids") or [0]
        if wanted == sorted(has):
            return source, None
        if len(wanted) == 1 and wanted[0] in has:
            return source, has.index(wanted[0])
    raise _Unsupported(f"its channels {wanted} are not those of one file of its recording")


def _lines(file: str) -> Iterator[tuple[str, bytes | Problem]]:
    number = 0
    try:
        with open_local(file) as raw:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw, 1):
                if line.strip():
                    yield f"{file}:{number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{file}:{number + 1}"
        yield where, Problem(where, "unreadable_row", f"the compressed file is damaged from here on: {error}")
