"""The bundle: what is registered, promoted and served, as one directory whose every byte is accounted for.

bundle.json    versions, unit vocabulary, sha256 of every file, lineage
bundle.sig     who vouches for bundle.json (optional, see `signature`)
encoder/       Hugging Face layout plus kmeans.safetensors
language/      Hugging Face layout
adapter/       PEFT layout (optional)
adapters/NAME/ PEFT layout, of one that requests name (optional)
vocoder/       config.json, model.safetensors
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechgpt.runtime import buckets, cache, signature
from speechgpt.runtime.signature import SignatureError
from speechgpt.runtime.tracking import resolve as resolve_registered
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

INDEX = "bundle.json"
FORMAT = 1
REQUIRED = ("encoder", "language", "vocoder")
OPTIONAL = ("adapter",)
ADAPTERS = "adapters"

_NAMED = re.compile(rf"{ADAPTERS}/[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}")

_VERSIONED = ("speechgpt-ray", "torch", "transformers", "peft", "safetensors")
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


class BundleError(ValueError):
    """A bundle that is incomplete, changed, or not there; the message names the file."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on this machine, every hash of which held."""

    directory: Path
    manifest: dict[str, Any]
    signer: str | None = None
    """Who signed it, of those whom the caller trusts; None where nobody was asked for."""

    @property
    def digest(self) -> str:
        """sha256 of the content (files and unit vocabulary), the same wherever and whenever it was made."""
        return str(self.manifest["digest"])

    def part(self, name: str) -> Path | None:
        """Directory of `encoder`, `language`, `vocoder` or `adapter`; None for an adapter that is not there."""
        folder = self.directory / name
        return folder if folder.is_dir() else None


def adapters(directory: Path) -> dict[str, Path]:
    """A bundle's named LoRA adapters: a request may ask for one in place of the bundle's own."""
    folder = directory / ADAPTERS
    return {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def write(
    directory: Path, parts: Mapping[str, Path], unit_vocabulary: Mapping[str, Any], lineage: Mapping[str, Any]
) -> Bundle:
    """Copy the parts into `directory`, a `Workspace.stage` so that it appears whole, and seal them with an index.

    parts: also `adapters/NAME`. Raises BundleError for a missing or unknown part, or a file that could run code when
    it is loaded.
    """
    if missing := [name for name in REQUIRED if name not in parts]:
        raise BundleError(f"a bundle needs the parts {', '.join(REQUIRED)}; missing: {', '.join(missing)}")
    if unknown := sorted(name for name in parts if name not in (*REQUIRED, *OPTIONAL) and not _NAMED.fullmatch(name)):
        raise BundleError(f"unknown parts of a bundle: {', '.join(unknown)}")
    for name, source in parts.items():
        if pickles := [file for file in source.rglob("*") if file.suffix in _PICKLES]:
            raise BundleError(
                f"{pickles[0]} would be unpickled by whoever loads it; a bundle takes safetensors and JSON only"
            )
        shutil.copytree(source, directory / name, dirs_exist_ok=True)
    content = {"unit_vocabulary": dict(unit_vocabulary), "files": _hashes(directory)}
    manifest = {
        "format": FORMAT,
        "digest": hashlib.sha256(_canonical(content)).hexdigest(),
        **content,
        "versions": {name: metadata.version(name) for name in _VERSIONED if _installed(name)},
        "lineage": dict(lineage),
    }
    sealed = {**manifest, "seal": hashlib.sha256(_canonical(manifest)).hexdigest()}
    (directory / INDEX).write_bytes(_canonical(sealed))
    return Bundle(directory, sealed)


def load(address: str | Path, tracking_uri: str = "", signers: tuple[str, ...] = ()) -> Bundle:
    """Bring a bundle to this machine (see `resolve`) and check every byte of it.

    signers: public keys; if there are any, one of them must have signed it. Raises BundleError naming the file.
    """
    directory = resolve(address, tracking_uri)
    manifest = _index(directory)
    signer = _signer(directory, signers) if signers else None
    actual = _hashes(directory)
    expected: dict[str, str] = manifest["files"]
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise BundleError(f"bundle {directory}: {name} is missing")
        if name not in expected:
            raise BundleError(f"bundle {directory}: {name} is not named in {INDEX}")
        if actual[name] != expected[name]:
            raise BundleError(
                f"bundle {directory}: {name} was changed (its sha256 is not the one in {INDEX}); fetch the bundle again"
            )
    return Bundle(directory, manifest, signer)


def sign(address: str | Path, key: "Ed25519PrivateKey") -> tuple[str, str]:
    """Check a bundle's every byte and put `bundle.sig` into it, a directory or `s3://…`; other signatures stay.

    Returns the signer's public key and the bundle's digest. Raises BundleError, SignatureError, WorkspaceError.
    """
    text = str(address)
    if not text.startswith("s3://") and not Path(text).is_dir():
        raise BundleError(f"bundle {text!r}: there is no such directory; only directories and s3://… can be signed")
    opened, home = load(text), Workspace(text)
    signed = home.read_bytes(signature.FILE) if home.exists(signature.FILE) else None
    # What was checked, not what may stand there by now.
    content = signature.sign((opened.directory / INDEX).read_bytes(), key, signed)
    if home.remote:
        home.write_bytes(signature.FILE, content)
    else:
        # Not by way of a workspace, whose staging folder would stand inside the bundle.
        (opened.directory / signature.FILE).write_bytes(content)
    return signature.name(key.public_key()), opened.digest


def resolve(address: str | Path, tracking_uri: str = "") -> Path:
    """A bundle's local directory, from a directory, `s3://…`, `models:/name@alias`, or the name of a shipped bundle.

    What has to be downloaded is kept (see `cache`).
    """
    text = str(address)
    if text.startswith("models:/"):
        return resolve_registered(text, tracking_uri)
    if text.startswith("s3://"):
        return _downloaded(Workspace(text))
    if Path(text).is_dir():
        return Path(text)
    if text in shipped():
        return Path(str(resources.files("speechgpt").joinpath("bundles", text)))
    raise BundleError(
        f"bundle {text!r}: no such directory, and not one of the shipped bundles {shipped()}; "
        "a directory, s3://…, models:/name@alias or a shipped name is expected"
    )


def shipped() -> list[str]:
    """Names of the bundles that come with the package."""
    folder = resources.files("speechgpt").joinpath("bundles")
    return (
        sorted(entry.name for entry in folder.iterdir() if entry.joinpath(INDEX).is_file()) if folder.is_dir() else []
    )


def _index(directory: Path) -> dict[str, Any]:
    """Read bundle.json; it must be, to the byte, what `write` writes."""
    where = f"bundle {directory}: {INDEX}"
    try:
        raw = (directory / INDEX).read_bytes()
        manifest: dict[str, Any] = json.loads(raw)
        seal = manifest["seal"]
    except FileNotFoundError:
        raise BundleError(f"{where} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{where} cannot be read: changed, or not a bundle's index") from None
    unsealed = {key: value for key, value in manifest.items() if key != "seal"}
    if hashlib.sha256(_canonical(unsealed)).hexdigest() != seal or _canonical(manifest) != raw:
        raise BundleError(f"{where} was changed after it was written; fetch the bundle again")
    if manifest["format"] != FORMAT:
        raise BundleError(f"{where} has format {manifest['format']}; this version of speechgpt reads format {FORMAT}")
    return manifest


def _signer(directory: Path, signers: tuple[str, ...]) -> str:
    file = directory / signature.FILE
    try:
        return signature.verify(
            (directory / INDEX).read_bytes(), file.read_bytes() if file.is_file() else None, signers
        )
    except SignatureError as error:
        raise BundleError(f"bundle {directory}: {error}") from None


def _hashes(directory: Path) -> dict[str, str]:
    """{file, relative to the bundle: sha256}, the index and its signatures left out."""
    apart = (directory / INDEX, directory / signature.FILE)
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file not in apart)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, files))
    return {file.relative_to(directory).as_posix(): value for file, value in zip(files, hashes, strict=True)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _downloaded(remote: Workspace) -> Path:
    """Fetch an S3 bundle once for each state of its index and signatures."""
    signed = remote.read_bytes(signature.FILE) if remote.exists(signature.FILE) else b""
    state = hashlib.sha256(remote.read_bytes(INDEX) + signed).hexdigest()
    return cache.keep(f"bundles/{state}", lambda folder: buckets.download(remote.fs, remote.root(), folder))
