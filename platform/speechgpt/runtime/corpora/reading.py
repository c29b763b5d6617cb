"""The table of layouts, and one corpus read by it."""

from collections.abc import Callable, Iterator
from typing import Any

from speechgpt.runtime.config import CorpusSection
from speechgpt.runtime.corpora import common_voice, lhotse, tables, trees, webdataset
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem
from speechgpt.runtime.files import FileFact, absolute, files_under

LAYOUTS: dict[str, Callable[..., Iterator[Found]]] = {
    "folder": trees.folder,
    "librispeech": trees.librispeech,
    "ljspeech": trees.ljspeech,
    "common-voice": common_voice.common_voice,
    "lhotse": lhotse.lhotse,
    "webdataset": webdataset.webdataset,
    "parquet": tables.parquet,
    "huggingface": tables.huggingface,
}
"""Readers: (top, the files below it by name) -> rows. They read text and tables, never sound."""


def read(corpus: CorpusSection) -> Iterator[Found]:
    """The rows of a corpus, with what the recipe says of all of them where the corpus does not say it of each.

    Raises ManifestError for a corpus that is not there, or of another layout.
    """
    top = absolute(corpus.uri).rstrip("/")
    files: list[FileFact] = files_under(top)
    if not files:
        raise ManifestError(f"{corpus.uri}: no such file or directory, or an empty one (corpora.sources)")
    options: dict[str, Any] = {"sounds": absolute(corpus.sounds)} if corpus.sounds else {}
    if options and corpus.layout != "lhotse":
        raise ManifestError(f"{corpus.uri}: sounds is for layout lhotse; {corpus.layout} says itself where sounds are")
    given = {name: getattr(corpus, name) for name in ("language", "speaker", "split")}
    count = 0
    for where, row in LAYOUTS[corpus.layout](top, files, **options):
        count += 1
        if isinstance(row, Problem):
            yield where, row
            continue
        known = {name: value for name, value in given.items() if value and not row.get(name)}
        yield where, row | known | ({"id": f"{corpus.prefix}{row['id']}"} if corpus.prefix else {})
    if not count:
        raise ManifestError(f"{corpus.uri}: no sound in any of its {len(files)} files (layout: {corpus.layout})")
