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


def _cut(where: str, line: bytes, sounds: str) -> Row | Problem:
    try:
        cut = json.loads(line)
        kind = cut.get("type", "MonoCut")
        if kind not in ("MonoCut", "MultiCut"):
            return Problem(where, "unsupported_cut", f"{kind}: only cuts of one recording are read")
        recording = cut.get("recording")
        if not recording:
            return Problem(where, "missing_key", "recording: the cut has none (features alone cannot become units)")
        source = recording["sources"][0]
        if source["type"] not in ("file", "url"):
            return Problem(where, "unsupported_cut", f"a recording of type {source['type']!r} is no file")
        whole = joined(sounds, source["source"])
        row = {"id": cut["id"], "path": whole + _stretch(cut, recording), "seconds": float(cut["duration"])}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return Problem(where, "unreadable_row", f"not a cut: {type(error).__name__} {error}")
    told = [s for s in cut.get("supervisions") or [] if isinstance(s, dict)]
    row["text"] = " ".join(s["text"] for s in told if s.get("text")) or None
    for key in ("speaker", "language"):
        values = {s[key] for s in told if s.get(key)}
        row[key] = values.pop() if len(values) == 1 else None
    return row


def _stretch(cut: dict[str, Any], recording: dict[str, Any]) -> str:
    """The fragment of the address; none for a cut that is the whole of a recording of one channel."""
    start, duration = float(cut["start"]), float(cut["duration"])
    channels = recording.get("channel_ids") or recording["sources"][0].get("channels") or [0]
    wanted = cut.get("channel", 0)
    channel = wanted if isinstance(wanted, int) and len(channels) > 1 else None
    if start == 0 and channel is None and abs(duration - float(recording["duration"])) < 1e-3:
        return ""
    return str(Stretch(start, start + duration, channel))


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
