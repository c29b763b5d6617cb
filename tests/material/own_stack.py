"""A development stack of a test's own: PostgreSQL, MLflow and S3 on free ports, gone afterwards."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from speechgpt.runtime.stack import postgres, services
from speechgpt.runtime.stack.layout import Layout, StackError


def _missing() -> str:
    if find_spec("psycopg2") is None:
        return "needs psycopg2-binary"
    try:
        postgres._program("initdb")
    except StackError as error:
        return str(error)
    return ""


_MISSING = _missing()
NEEDS_POSTGRES = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def own_layout() -> Iterator[Layout]:
    """Not in pytest's own directory, which PostgreSQL's user cannot enter. Nothing runs yet."""
    directory = Path(tempfile.mkdtemp(prefix="speechgpt-stack-"))
    directory.chmod(0o755)
    made = Layout(directory, free_port(), free_port(), free_port())
    try:
        yield made
    finally:
        list(services.down(made))
        shutil.rmtree(directory)
