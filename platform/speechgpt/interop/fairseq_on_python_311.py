"""Lets fairseq 0.12.2 (2022) be imported on Python 3.11 with today's hydra and numpy. Import it before fairseq.

It stands by itself, for it is copied into fairseq's own environment.
"""

import dataclasses
import functools
import sys
from typing import Any

import numpy as np

_process_class: Any = dataclasses._process_class  # type: ignore[attr-defined]


@functools.wraps(_process_class)
def _hashable(cls: type, *arguments: Any, **named: Any) -> Any:
    """Python 3.11 refuses defaults that have no hash, which compared dataclasses have not unless they ask for one."""
    init, shown, eq, order, unsafe_hash, frozen, *rest = arguments
    if (
        cls.__module__.partition(".")[0] in ("fairseq", "hydra")
        and eq
        and not frozen
        and "__hash__" not in cls.__dict__
    ):
        unsafe_hash = True
    return _process_class(cls, init, shown, eq, order, unsafe_hash, frozen, *rest, **named)


dataclasses._process_class = _hashable  # type: ignore[attr-defined]

# numpy 1.24 dropped these names of Python's own types.
for _name, _type in {"float": float, "int": int, "bool": bool, "object": object, "complex": complex}.items():
    if _name not in np.__dict__:
        setattr(np, _name, _type)

# Only data loading would need it, and its wheels link CUDA: beside a CPU build of torch the import fails otherwise.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]
