"""HTML files that need nothing else, from the templates beside this module."""

import base64
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from speechgpt.speech import audio


def render_page(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """`templates/TEMPLATE.html.j2` with these values. Everywhere a filter `sound` makes a file of sound playable."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"sound": _sound, **filters}
    source = resources.files(__package__).joinpath("templates", f"{template}.html.j2").read_text("utf-8")
    return environment.from_string(source).render(**values)


def _sound(data: bytes) -> str:
    """A data URI that every browser plays."""
    return "data:audio/mpeg;base64," + base64.b64encode(audio.encode(audio.decode(data), "mp3")).decode()
