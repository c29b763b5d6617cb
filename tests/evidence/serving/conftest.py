"""The serving side's tiny bundles, of whom its own tests are."""

import importlib.util
from pathlib import Path

_SOURCE = Path(__file__).parents[2] / "serve" / "conftest.py"
_specification = importlib.util.spec_from_file_location("serve_fixtures", _SOURCE)
assert _specification and _specification.loader
_fixtures = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(_fixtures)

tiny, tiny_bundle, endless_bundle, clip, long_clip = (
    getattr(_fixtures, name) for name in ("tiny", "tiny_bundle", "endless_bundle", "clip", "long_clip")
)
