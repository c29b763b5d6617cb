"""Corpora that are directories of sound files: any folder, LibriSpeech, LJSpeech."""

import posixpath
from collections.abc import Iterator

from speechgpt.runtime.corpora.names import below, is_sound, split_of
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem
from speechgpt.runtime.files import FileFact, read_bytes

_SIDECARS = (".txt", ".lab")


def folder(top: str, files: list[FileFact]) -> Iterator[Found]:
    """Every sound file, named by its place below `top`; a `.txt` or `.lab` of the same name is its transcript."""
    names = {file.uri for file in files}
    for name in sorted(filter(is_sound, names)):
        stem = posixpath.splitext(name)[0]
        sidecar = next((stem + ending for ending in _SIDECARS if stem + ending in names), None)
        row = {"id": below(top, name), "path": name}
        if sidecar is None:
            yield name, row
            continue
        try:
            yield name, row | {"text": " ".join(read_bytes(sidecar).decode().split())}
        except UnicodeDecodeError as error:
            yield sidecar, Problem(sidecar, "unreadable_row", f"the transcript is not UTF-8: {error}")


def librispeech(top: str, files: list[FileFact]) -> Iterator[Found]:
    """`SPLIT/SPEAKER/CHAPTER/ID.flac`, transcripts in `….trans.txt`; `top` may be one split or a part of it."""
    names = {file.uri for file in files}
    transcripts = sorted(name for name in names if name.endswith(".trans.txt"))
    if not transcripts:
        raise ManifestError(f"{top}: no *.trans.txt below it, so it is no LibriSpeech tree (layout: folder?)")
    told = set()
    for transcript in transcripts:
        place = posixpath.dirname(transcript)
        known = {"language": "en", "split": split_of(place.split("/")[-3] if place.count("/") > 2 else None)}
        for where, line in _lines(transcript):
            if isinstance(line, Problem):
                yield where, line
                continue
            name, _, text = line.partition(" ")
            told.add(f"{place}/{name}.flac")
            yield where, {"id": name, "path": f"{place}/{name}.flac", "text": text} | _speaker(name) | known
    for name in sorted(name for name in names - told if is_sound(name)):
        known = {"language": "en", "split": split_of(name.split("/")[-4] if name.count("/") > 3 else None)}
        stem = posixpath.splitext(posixpath.basename(name))[0]
        yield name, {"id": stem, "path": name} | _speaker(stem) | known


def ljspeech(top: str, files: list[FileFact]) -> Iterator[Found]:
    """`metadata.csv` (`id|text|normalised text`) beside `wavs/`; the normalised text is taken where there is one."""
    names = {file.uri for file in files}
    index = f"{top}/metadata.csv"
    if index not in names:
        raise ManifestError(f"{index}: no such file, so {top} is no LJSpeech tree (layout: folder?)")
    told = set()
    for where, line in _lines(index):
        if isinstance(line, Problem):
            yield where, line
            continue
        name, *texts = line.split("|")
        if not 1 <= len(texts) <= 2:
            yield where, Problem(where, "unreadable_row", f"id|text|normalised text is expected, not {line[:80]!r}")
            continue
        path = next((path for path in (f"{top}/wavs/{name}.wav", f"{top}/wavs/{name}.flac") if path in names), None)
        told.add(path)
        yield where, {"id": name, "path": path or f"{top}/wavs/{name}.wav", "text": texts[-1].strip() or texts[0]}
    for name in sorted(name for name in names - told if is_sound(name)):
        yield name, {"id": posixpath.splitext(posixpath.basename(name))[0], "path": name}


def _speaker(name: str) -> dict[str, str]:
    speaker, dash, _ = name.partition("-")
    return {"speaker": speaker} if dash else {}


def _lines(file: str) -> Iterator[tuple[str, str | Problem]]:
    """(`file:line`, the line), counted from 1, without empty ones."""
    for number, raw in enumerate(read_bytes(file).split(b"\n"), 1):
        where = f"{file}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield where, Problem(where, "unreadable_row", f"not UTF-8: {error}")
            continue
        if line:
            yield where, line
