"""The table of published files (`published.yaml`): where they are, what is known of them, under which terms."""

from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Annotated

import yaml
from pydantic import Field, StringConstraints, field_validator, model_validator

from speechgpt.section import Section

Address = Annotated[str, StringConstraints(pattern=r"^https://")]


class PublishedFile(Section):
    """One file of an artefact. `name` is its path inside the artefact's folder.

    urls: the same file at several addresses, tried in order. bytes and sha256: None where nobody has stated them.
    about_bytes: a rounded size that is shown and never checked.
    """

    name: str = Field(min_length=1)
    urls: Annotated[tuple[Address, ...], Field(min_length=1)]
    bytes: int | None = Field(None, ge=1)
    bytes_from: str = ""
    about_bytes: int | None = Field(None, ge=1)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    sha256_from: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named_in_urls(cls, row: object) -> object:
        """`{name}` in a URL stands for the file's name."""
        if isinstance(row, dict) and isinstance(row.get("urls"), list):
            return {**row, "urls": tuple(url.replace("{name}", row.get("name", "")) for url in row["urls"])}
        return row

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.name.startswith("."):
            raise ValueError(f"{name!r} is no path inside a folder")
        return name

    @model_validator(mode="after")
    def _says_who_knows(self) -> "PublishedFile":
        if bool(self.sha256) != bool(self.sha256_from) or bool(self.bytes) != bool(self.bytes_from):
            raise ValueError(f"{self.name}: a sha256 or a length comes with who stated it, and the other way round")
        return self

    @property
    def size(self) -> int | None:
        """Bytes, exact or rounded; None when unknown."""
        return self.bytes or self.about_bytes


class Artefact(Section):
    """What one name of `speechgpt download` stands for. `files` is empty where the licence forbids to hand them on."""

    title: str = Field(min_length=1)
    source: Address
    licence: str = Field(min_length=1)
    terms: str = Field(min_length=1)
    files: tuple[PublishedFile, ...]


class UnknownArtefact(KeyError):
    """A name that is not in the table; the message lists those that are."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def table() -> dict[str, Artefact]:
    """Every artefact by its name, in the order in which they are needed."""
    text = resources.files("speechgpt.interop").joinpath("published.yaml").read_text("utf-8")
    return {name: Artefact.model_validate(entry) for name, entry in yaml.safe_load(text).items()}


def find(name: str) -> Artefact:
    """Raises UnknownArtefact."""
    try:
        return table()[name.lower()]
    except KeyError:
        raise UnknownArtefact(f"nothing is published as {name!r}; there are {', '.join(table())}") from None
