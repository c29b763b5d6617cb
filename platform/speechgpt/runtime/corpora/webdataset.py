"""WebDataset: tar files whose members of one name are one sample."""

import json
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from speechgpt.runtime.corpora.names import below, fields, is_sound
from speechgpt.runtime.corpora.outcome import Found, ManifestError, Problem
from speechgpt.runtime.files import FileFact, open_local
from speechgpt.runtime.inside_files import ByteRange

_TEXTS = (".txt", ".text", ".transcript")


def webdataset(top: str, files: list[FileFact]) -> Iterator[Found]:
    """A sample a row: its sound stays where it is, in the tar; `.txt` is its transcript, `.json` its other fields.

    Its id is its key in the tar, after the tar's own place in a directory of them: keys may begin anew in each tar.
    A tar that is damaged or cut off gives what is before that place, and a problem. Over S3 each tar is fetched once.
    Raises ManifestError for compressed tars: nothing inside them can be read without unpacking all that is before it.
    """
    tars = [file.uri for file in files if file.uri.endswith(".tar")]
    packed = [file.uri for file in files if file.uri.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz"))]
    if packed:
        raise ManifestError(f"{packed[0]}: a compressed tar has no places to read sounds from; gunzip it first")
    if not tars:
        raise ManifestError(f"{top}: no .tar there")
    for name in tars:
        place = "" if name == top else below(top, name).removesuffix(".tar") + "/"
        for where, row in _samples(name):
            yield where, row if isinstance(row, Problem) else row | {"id": place + row["id"]}


def _samples(name: str) -> Iterator[Found]:
    key, sample = "", dict[str, Any]()
    try:
        with open_local(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if (own := f"{folder}{slash}{stem}") != key:
                    yield from _row(name, key, sample)
                    key, sample = own, {}
                if is_sound(base):
                    sample["sound"] = ByteRange(member.offset_data, member.size)
                elif f".{ending}" in (*_TEXTS, ".json"):
                    content = tar.extractfile(member)
                    sample[f".{ending}"] = b"" if content is None else content.read()
                    if len(sample[f".{ending}"]) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
            _check_end(file, tar.offset)
    except tarfile.TarError as error:
        yield from _row(name, key, sample)
        where = f"{name}:{key}"
        yield where, Problem(where, "unreadable_row", f"the tar cannot be read any further: {error}")
        return
    yield from _row(name, key, sample)


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raises ReadError if anything but zeros is behind the last member: tarfile takes a damaged header for the end."""
    file.seek(offset)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"after byte {offset} there is neither a member nor the end")


def _row(name: str, key: str, sample: dict[str, Any]) -> Iterator[Found]:
    if not sample:
        return
    where = f"{name}:{key}"
    if "sound" not in sample:
        yield where, Problem(where, "missing_key", f"no sound among the members of {key!r}: {sorted(sample)}")
        return
    if sample["sound"].count == 0:
        yield where, Problem(where, "missing_file", f"the sound of {key!r} has no bytes")
        return
    try:
        row = fields(json.loads(sample.get(".json") or b"{}"))
        text = next((sample[ending] for ending in _TEXTS if ending in sample), None)
        row |= {} if text is None else {"text": text.decode().strip()}
    except (ValueError, TypeError) as error:
        yield where, Problem(where, "unreadable_row", f"the fields of {key!r} cannot be read: {error}")
        return
    yield where, row | {"id": key, "path": f"{name}{sample['sound']}"}
