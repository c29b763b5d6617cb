"""`speechgpt download`: bring published checkpoints and data here, whole and checked or not at all.

Files land in `--to DIR` (default: this machine's cache), one folder an artefact. A file whose SHA-256 nobody has
published is reported as unverified together with the hash that it has; that hash is kept beside it and holds from then
on: a later run tells a file that has changed since.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from speechgpt.interop.published import Artefact, PublishedFile
    from speechgpt.interop.transfer import Arrived, Transfer
    from speechgpt.runtime.progress import Progress

RECEIPT = "download.json"
_SAID = {
    "published": "sha256 as published",
    "host": "sha256 as its host states",
    "earlier": "sha256 as when it was downloaded",
    "none": "UNVERIFIED, nobody has published its hash",
}


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="What to bring; see --list.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="Where to: DIR/NAME/… Default: the cache, SPEECHGPT_CACHE.", metavar="DIR")
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Take the files from here: an address in place of the publishers' hosts, or a folder. "
            "Also SPEECHGPT_MIRROR, and HF_ENDPOINT for the Hub's files.",
            metavar="URL|DIR",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show what there is, and its terms.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Bring published checkpoints and data here, resumed and verified."""
    from speechgpt.interop.mirror import AddressError, Mirror
    from speechgpt.interop.published import UnknownArtefact, find
    from speechgpt.interop.transfer import Transfer, TransferError
    from speechgpt.runtime import cache
    from speechgpt.runtime.progress import Progress

    if show:
        _list(as_json)
        return
    if not names:
        raise typer.BadParameter("name what to download, or ask for --list", param_hint="NAME")
    try:
        wanted = {name.lower(): find(name) for name in names}
        chosen = Mirror.of(mirror)
    except (UnknownArtefact, AddressError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    root = to or cache.folder() / "published"
    progress = Progress(silent=as_json)
    for name, artefact in wanted.items():
        # Terms come before bytes, and on standard error also where standard output is for a program.
        typer.echo(_introduced(name, artefact), err=True)
    transfer = Transfer(chosen, progress)
    results = []
    try:
        for name, artefact in wanted.items():
            results.append(bring(name, artefact, root / name, transfer, progress))
    except (TransferError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        transfer.close()
    if as_json:
        typer.echo(json.dumps({"artefacts": results}, indent=2))
    else:
        for result in results:
            typer.echo(_told(result))


def bring(name: str, artefact: "Artefact", folder: Path, transfer: "Transfer", progress: "Progress") -> dict[str, Any]:
    """Every file of an artefact into `folder`; those that are there and as they should be are left alone.

    Returns what `--json` prints of it. Raises TransferError; OSError for a disk that does not take the files.
    """
    from speechgpt.interop.transfer import TransferError

    if not artefact.files:
        raise TransferError(f"{name}: {artefact.licence}. {artefact.terms}")
    receipts = _receipts(folder)
    files = []
    for file in artefact.files:
        facts = _present(file, folder, receipts.get(file.name), progress)
        if facts is None:
            arrived = _arrive(name, file, folder, transfer)
            facts = {**asdict(arrived), "path": str(arrived.path), "downloaded": True}
            receipts[file.name] = {key: facts[key] for key in ("origin", "bytes", "sha256", "proof")}
            _write_receipts(folder, receipts)
        files.append({"name": file.name, **facts})
    return {
        "name": name,
        "directory": str(folder),
        "licence": artefact.licence,
        "terms": artefact.terms,
        "source": artefact.source,
        "files": files,
    }


def _arrive(name: str, file: "PublishedFile", folder: Path, transfer: "Transfer") -> "Arrived":
    from speechgpt.interop.transfer import Expected

    expected = Expected(file.sha256, file.bytes)
    mirror = transfer.mirror
    if mirror.folder is not None:
        return transfer.copy(mirror.candidates(name, file.name, file.urls), folder / file.name, expected)
    return transfer.fetch(file.urls, folder / file.name, expected)


def _present(
    file: "PublishedFile", folder: Path, receipt: dict[str, Any] | None, progress: "Progress"
) -> dict[str, Any] | None:
    """What is known of a file that is already here; None if it is not, or is another and has to come anew."""
    path = folder / file.name
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    size = path.stat().st_size
    earlier = (receipt or {}).get("sha256")
    wanted = file.sha256 or earlier
    if (wanted and sha256 != wanted) or (file.bytes and size != file.bytes):
        progress.say(f"{path}: not what was published (sha256 {sha256}, {size} bytes); it is fetched anew")
        return None
    proof = "published" if file.sha256 else "earlier" if earlier else "none"
    origin = (receipt or {}).get("origin", "")
    return {
        "path": str(path),
        "origin": origin,
        "bytes": size,
        "sha256": sha256,
        "proof": proof,
        "resumed": 0,
        "downloaded": False,
    }


def _receipts(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECEIPT).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_receipts(folder: Path, receipts: dict[str, Any]) -> None:
    draft = folder / f".{RECEIPT}.draft"
    draft.write_text(json.dumps(receipts, indent=1, sort_keys=True) + "\n")
    draft.replace(folder / RECEIPT)


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['name']}: {result['directory']}"]
    for file in result["files"]:
        how = "" if file["downloaded"] else ", was here already"
        how += f", resumed at {file['resumed']} bytes" if file["resumed"] else ""
        lines.append(f"  {file['name']}  {_size(file['bytes'])}{how}\n    {file['sha256']}  {_SAID[file['proof']]}")
    return "\n".join(lines)


def _list(as_json: bool) -> None:
    from speechgpt.interop.published import table

    if as_json:
        typer.echo(json.dumps({name: entry.model_dump(mode="json") for name, entry in table().items()}, indent=2))
        return
    for name, artefact in table().items():
        typer.echo(_introduced(f"{name} ({_extent(artefact)})", artefact))


def _introduced(name: str, artefact: "Artefact") -> str:
    return f"{name}: {artefact.title}\n  licence: {artefact.licence}\n  {artefact.terms}"


def _extent(artefact: "Artefact") -> str:
    """`27.0 GB in 6 files, 1 with a published hash`, as far as it is known."""
    if not artefact.files:
        return "not downloaded"
    sizes = [file.size for file in artefact.files]
    known = sum(file.sha256 is not None for file in artefact.files)
    about = "" if all(file.bytes for file in artefact.files) else "about "
    size = about + _size(sum(filter(None, sizes))) if any(sizes) else "of unknown size"
    more = " and more" if any(sizes) and not all(sizes) else ""
    many = f"{len(sizes)} file" + ("s" if len(sizes) > 1 else "")
    return f"{size}{more} in {many}, {known or 'none'} with a published hash"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} B"
