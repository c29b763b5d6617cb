"""Signatures of bundles: who vouches for the index of one, and with it for every byte that the index names.

Ed25519 (RFC 8032) over the bytes of `bundle.json`; beside it, `bundle.sig` is a JSON list of {signer, signature}. Keys
are written `ed25519:` and base64 of their 32 bytes; a private key is a PEM file (PKCS #8).
"""

import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE = "bundle.sig"
_SCHEME = "ed25519:"


class SignatureError(ValueError):
    """A key or signature that is malformed, missing, or not by whom it should be."""


def public_key(text: str) -> "Ed25519PublicKey":
    """Raises SignatureError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = base64.b64decode(text.removeprefix(_SCHEME), validate=True)
    except binascii.Error:
        raw = b""
    if not text.startswith(_SCHEME) or len(raw) != 32:
        raise SignatureError(f"{text!r} is no public key: {_SCHEME} and base64 of 32 bytes are expected")
    return Ed25519PublicKey.from_public_bytes(raw)


def name(key: "Ed25519PublicKey") -> str:
    """The public key as recipes and signatures write it."""
    return _SCHEME + base64.b64encode(key.public_bytes_raw()).decode()


def private_key(file: Path) -> "Ed25519PrivateKey":
    """Raises SignatureError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise SignatureError(f"key {file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise SignatureError(f"key {file} is not an unencrypted private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"key {file} is not an Ed25519 key; `speechgpt signature key` makes one")
    return key


def new_private_key(file: Path) -> "Ed25519PrivateKey":
    """Make a key and write it to `file`, for its owner's eyes only. Raises SignatureError if there is a file."""
    import os

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
            target.write(pem)
    except FileExistsError:
        raise SignatureError(f"{file} is there already; a key is not overwritten") from None
    except OSError as error:
        raise SignatureError(f"key {file} cannot be written: {error.strerror}") from None
    return key


def sign(index: bytes, key: "Ed25519PrivateKey", signed: bytes | None = None) -> bytes:
    """Content of `bundle.sig`. signed: what it was before; signatures of others stay. Raises SignatureError."""
    signer = name(key.public_key())
    entry = {"signer": signer, "signature": base64.b64encode(key.sign(index)).decode()}
    others = [(who, proof) for who, proof in _entries(signed) if who != signer] if signed else []
    kept = [{"signer": who, "signature": base64.b64encode(proof).decode()} for who, proof in others]
    return json.dumps([*kept, entry], indent=1).encode() + b"\n"


def verify(index: bytes, signed: bytes | None, trusted: tuple[str, ...]) -> str:
    """The trusted signer, as `name` writes it, whose signature holds. Raises SignatureError when there is none."""
    from cryptography.exceptions import InvalidSignature

    if signed is None:
        raise SignatureError(f"it is not signed: there is no {FILE}; `speechgpt signature sign` makes one")
    entries = _entries(signed)
    for signer, proof in entries:
        if signer not in trusted:
            continue
        try:
            public_key(signer).verify(proof, index)
        except InvalidSignature:
            raise SignatureError(f"the signature by {signer} does not fit: it is of other content") from None
        return signer
    signers = ", ".join(signer for signer, _ in entries) or "nobody"
    raise SignatureError(f"it is signed by {signers}, of whom none is trusted")


def _entries(signed: bytes) -> list[tuple[str, bytes]]:
    try:
        return [
            (str(entry["signer"]), base64.b64decode(entry["signature"], validate=True)) for entry in json.loads(signed)
        ]
    except (ValueError, KeyError, TypeError):
        raise SignatureError(f"{FILE} cannot be read: changed, or not a bundle's signatures") from None
