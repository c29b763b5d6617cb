"""fairseq in its own environment, as the other side of a benchmark."""

import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from speechgpt.interop import fairseq_environment

_SCRIPT = Path(__file__).with_name("fairseq_side.py")


class BenchError(RuntimeError):
    """A benchmark that cannot be run here, or whose sides disagree."""


class Fairseq:
    """A process that holds one of its models and works on one clip at a time (`fairseq_side.py`).

    Raises BenchError where fairseq cannot be had: there is no baseline then.
    """

    def __init__(self, threads: int, **model: Any) -> None:
        try:
            python = fairseq_environment.interpreter()
        except fairseq_environment.FairseqEnvironmentError as error:
            raise BenchError(f"no baseline without fairseq, so nothing is measured. {error}") from None
        environment = {**fairseq_environment.environment(), "OMP_NUM_THREADS": str(threads)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, _SCRIPT, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.ask(**model)

    def ask(self, **order: Any) -> dict[str, Any]:
        """One clip: `wall` and `processor` seconds, and the `result`."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise BenchError(f"fairseq's side stopped:\n{self._log.read()[-3000:]}")
        return json.loads(answer)

    def __enter__(self) -> "Fairseq":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
