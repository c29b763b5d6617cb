"""The verb `convert` as a command, and files to convert."""

from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

Convert = Callable[..., Result]


@pytest.fixture
def convert() -> Convert:
    """Runs `speechgpt convert WORDS…`; gives exit code, standard output and standard error."""
    from speechgpt.interop.convert import main

    app = typer.Typer()
    app.command()(main)

    def run(*words: Any) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run
