"""The bundle that a Serve application serves: named once, opened by each replica on its own node."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from speechgpt.runtime import bundle
from speechgpt.runtime.config import ServingSection
from speechgpt.runtime.tracking import pin

ENCODER, LANGUAGE_MODEL, VOCODER = "Encoder", "LanguageModel", "Vocoder"
"""Names of a bundle's deployments in its application."""


@dataclass(frozen=True)
class Source:
    """address: an absolute directory, `s3://…`, `models:/name/version` or a shipped name.

    digest: what was found there when the service was started; another one by now stops a new replica from starting.
    created: Unix seconds. signers: public keys, one of which must have signed it; none, if it need not be. adapters:
    names of those that requests may ask for.
    """

    address: str
    tracking_uri: str
    digest: str
    name: str
    created: int
    signers: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def find(address: str, tracking_uri: str, signers: tuple[str, ...] = ()) -> Source:
    """Check a bundle and pin it, an alias to the version that it names. Raises BundleError, TrackingError."""
    if address.startswith("models:/"):
        address = pin(address, tracking_uri)
    address = str(Path(address).absolute()) if Path(address).is_dir() else address
    opened = bundle.load(address, tracking_uri, signers)
    created = int((opened.directory / bundle.INDEX).stat().st_mtime)
    name, adapters = model_name(address), tuple(bundle.adapters(opened.directory))
    if name in adapters:
        raise bundle.BundleError(f"bundle {address}: its adapter {name!r} has the name of the model itself")
    return Source(address, tracking_uri, opened.digest, name, created, signers, adapters)


def required_signers(serving: ServingSection) -> tuple[str, ...]:
    """Of whom one must have signed a bundle that a recipe serves."""
    return serving.trusted_signers if serving.require_signature else ()


def model_name(address: str) -> str:
    """What clients call the model: a shipped or registered name as it is, else the last part of the path."""
    if address.startswith("models:/"):
        return re.split("[@/]", address.removeprefix("models:/"))[0]
    return address.rstrip("/").rpartition("/")[2]


@lru_cache(maxsize=4)
def open_bundle(source: Source) -> bundle.Bundle:
    """Bring the bundle to this node and check it. Raises BundleError, also when it is not the pinned one any more."""
    opened = bundle.load(source.address, source.tracking_uri, source.signers)
    if opened.digest != source.digest:
        raise bundle.BundleError(
            f"bundle {source.address} is now {opened.digest[:12]}, but the service was started with "
            f"{source.digest[:12]}: start it again to serve the new one"
        )
    return opened
