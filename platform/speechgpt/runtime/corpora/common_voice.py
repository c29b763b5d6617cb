"""Common Voice: tab-separated lists beside `clips/`."""

import posixpath
from collections.abc import Iterator

from speechgpt.runtime.corpora.names import fields, split_of
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem
from speechgpt.runtime.files import FileFact, read_bytes

_SPLITS = ("train", "dev", "test")


def common_voice(top: str, files: list[FileFact]) -> Iterator[Found]:
    """Rows of one `.tsv`, or of `train`, `dev` and `test.tsv` of a language's directory (else of `validated.tsv`).

    Lengths come from `clip_durations.tsv` (milliseconds) where that is there. The other columns (votes, age, accent)
    are kept.
    """
    names = {file.uri for file in files}
    splits = [f"{top}/{split}.tsv" for split in _SPLITS]
    lists = [top] if top.endswith(".tsv") else [name for name in splits if name in names]
    if not lists and f"{top}/validated.tsv" in names:
        lists = [f"{top}/validated.tsv"]
    if not lists:
        raise ManifestError(f"{top}: a Common Voice .tsv is expected, or a directory with train.tsv or validated.tsv")
    lengths = _lengths(f"{posixpath.dirname(lists[0])}/clip_durations.tsv")
    for file in lists:
        split = split_of(posixpath.basename(file).removesuffix(".tsv"))
        for where, given in _table(file):
            if isinstance(given, Problem):
                yield where, given
                continue
            clip = given.pop("path")
            name = clip if posixpath.splitext(clip)[1] else f"{clip}.mp3"
            row = fields({key: value for key, value in given.items() if value})
            row |= {"id": posixpath.splitext(name)[0], "path": f"{posixpath.dirname(file)}/clips/{name}"}
            yield where, row | ({"split": split} if split else {}) | lengths.get(name, {})


def _table(file: str) -> Iterator[tuple[str, dict[str, str] | Problem]]:
    """(`file:line`, {column: value}); quotes have no meaning in these files."""
    header: list[str] = []
    for number, raw in enumerate(read_bytes(file).split(b"\n"), 1):
        where = f"{file}:{number}"
        try:
            cells = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            yield where, Problem(where, "unreadable_row", f"not UTF-8: {error}")
            continue
        if not header:
            header = cells
            if missing := {"path", "sentence"} - set(header):
                raise ManifestError(f"{file}: no column {sorted(missing)}; it has {header}")
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif cells != [""]:
            yield where, Problem(where, "unreadable_row", f"{len(cells)} cells, and the header has {len(header)}")


def _lengths(file: str) -> dict[str, dict[str, float]]:
    try:
        lines = read_bytes(file).decode().splitlines()[1:]
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    pairs = (line.split("\t") for line in lines)
    return {pair[0]: {"seconds": int(pair[1]) / 1000} for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
