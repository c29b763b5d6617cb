"""Where a published file is really fetched from: its own address, a mirror's, or a folder of this machine.

A mirror takes the place of scheme and host and keeps the path, as the Hub's mirrors do. HF_ENDPOINT does the same for
the Hub's files alone, because users of the Hub have it set already.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

MIRROR_VARIABLE = "SPEECHGPT_MIRROR"
HUB_VARIABLE = "HF_ENDPOINT"
HUB = "https://huggingface.co"


class AddressError(ValueError):
    """An address that must not be fetched from; the message says which rule forbids it."""


@dataclass(frozen=True)
class Mirror:
    """address: a base URL, a folder, or empty for the publishers' own hosts. hub: the same for the Hub's files."""

    address: str = ""
    hub: str = ""

    @classmethod
    def of(cls, option: str | None) -> "Mirror":
        """The mirror that the command line names, else the environment. Raises AddressError."""
        address = option or os.environ.get(MIRROR_VARIABLE) or ""
        mirror = cls(address.rstrip("/") or address, (os.environ.get(HUB_VARIABLE) or "").rstrip("/"))
        if "://" in mirror.address:
            scheme = urlsplit(mirror.address).scheme
            if scheme not in ("http", "https") or not urlsplit(mirror.address).netloc:
                raise AddressError(f"mirror {mirror.address}: an http or https address, or a folder, is expected")
        elif mirror.address and not Path(mirror.address).is_dir():
            raise AddressError(f"mirror {mirror.address}: no such folder (an address begins with http:// or https://)")
        return mirror

    @property
    def folder(self) -> Path | None:
        """The folder that is the mirror, if it is one."""
        return Path(self.address) if self.address and "://" not in self.address else None

    def url(self, published: str) -> str:
        """The address to ask for a file that is published at another."""
        base = self.address if "://" in self.address else ""
        if not base and self.hub and published.startswith(HUB + "/"):
            base = self.hub
        if not base:
            return published
        parts = urlsplit(published)
        return base + parts.path + (f"?{parts.query}" if parts.query else "")

    def candidates(self, artefact: str, name: str, urls: tuple[str, ...]) -> list[Path]:
        """Where a mirror folder may hold the file: as `download --to` leaves it, as `wget --force-directories` does,
        by the address's path alone, or with all files side by side."""
        assert self.folder is not None
        parts = [urlsplit(url) for url in urls]
        places = [Path(artefact, name)]
        places += [Path(str(part.hostname), unquote(part.path).lstrip("/")) for part in parts]
        places += [Path(unquote(part.path).lstrip("/")) for part in parts]
        return [self.folder / place for place in (*places, Path(name))]

    def check(self, url: str) -> None:
        """Raises AddressError for an address that is neither https, nor on this machine, nor the mirror's own."""
        parts = urlsplit(url)
        if parts.scheme == "https" and parts.hostname:
            return
        if parts.scheme == "http" and (_is_loopback(parts.hostname) or self._is_named(parts.netloc)):
            return
        raise AddressError(f"{url}: only https is fetched from, unless the host is this machine or a mirror you name")

    def _is_named(self, netloc: str) -> bool:
        return netloc in {urlsplit(base).netloc for base in (self.address, self.hub) if "://" in base}


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
