"""The form that every section of a recipe has: closed to unknown keys, and unchangeable once read."""

from enum import Enum
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Mark(Enum):
    """What `Annotated[type, Mark]` says of a recipe's key."""

    LIMIT = "limit"
    """It says how far a job may go or what it may take, not what it makes: with another value it goes on from where it
    stopped, and what is made is as good as before."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def content(value: T) -> T:
    """A section, or what it holds, with every limit at its default: what a result depends on."""
    if isinstance(value, Section):
        fields = type(value).model_fields
        kept = {
            name: field.default if Mark.LIMIT in field.metadata else content(getattr(value, name))
            for name, field in fields.items()
        }
        return value.model_copy(update=kept)
    if isinstance(value, dict):
        return {key: content(each) for key, each in value.items()}  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map(content, value))  # type: ignore[return-value]
    return value
