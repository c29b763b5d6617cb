"""Downloads that this machine keeps: SPEECHGPT_CACHE, by default ~/.cache/speechgpt."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    return Path(os.environ.get("SPEECHGPT_CACHE") or Path.home() / ".cache" / "speechgpt")


def keep(name: str, fill: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache; where there is none, `fill` makes it, and it appears whole or not at all."""
    target = folder() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{uuid.uuid4().hex}"
    try:
        fill(draft)
        draft.rename(target)
    except OSError:
        # Another process of this machine may have finished the same download first.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
