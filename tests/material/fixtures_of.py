"""Fixtures of another folder: pytest gives what a conftest.py defines to the tests below it only."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def fixtures_of(folder: str) -> ModuleType:
    """The conftest of a folder of tests, to take fixtures from by name."""
    spec = spec_from_file_location(f"{folder}_fixtures", Path(__file__).parents[1] / folder / "conftest.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
