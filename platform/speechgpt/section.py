"""The form that every section of a recipe has: closed to unknown keys, and unchangeable once read."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
