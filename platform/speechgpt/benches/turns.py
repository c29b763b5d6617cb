"""Programs that are measured in turns: each works when it is told to and waits, at no cost, while another does."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from speechgpt.interop.benches.baseline import BenchError


class Turns:
    """Inside a program that is measured: `begin` waits for its turn, `end` tells what was done in it.

    Orders come on standard input, answers go to what was standard output; whatever else is printed goes to standard
    error. When there are no more orders the process ends.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._profiler: Any = None

    def begin(self) -> None:
        order = sys.stdin.readline()
        if not order:
            # Without the good-byes of process groups, whose other ranks may be gone already.
            os._exit(0)
        if order.strip() == "profile":
            from torch.profiler import ProfilerActivity, profile

            self._profiler = profile(activities=[ProfilerActivity.CPU])
            self._profiler.__enter__()
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def end(self, **figures: Any) -> None:
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        if self._profiler is not None:
            from speechgpt.interop.benches.timing import shares

            self._profiler.__exit__(None, None, None)
            figures["profile"], self._profiler = shares(self._profiler), None
        print(json.dumps({"wall": wall, "processor": processor, **figures}), file=self._answers)


class Program:
    """Outside: a module of `speechgpt.benches` as one process a rank, with the environment that torchrun gives."""

    def __init__(self, module: str, folder: Path, workers: int, threads: int) -> None:
        self.name = module.rpartition(".")[2]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the processes
        environment = {
            **os.environ,
            "WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(workers)
        ]

    def turn(self, order: str = "go") -> dict[str, Any]:
        """One turn: the slowest rank's `wall`, all ranks' `processor` seconds, and rank 0's other figures.

        Raises BenchError with the program's last words when it stops.
        """
        answers = []
        try:
            for rank in self._ranks:
                assert rank.stdin
                rank.stdin.write(order + "\n")
                rank.stdin.flush()
            for rank in self._ranks:
                assert rank.stdout
                answers.append(json.loads(rank.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            self._log.seek(0)
            raise BenchError(f"{self.name} stopped:\n{self._log.read()[-3000:]}") from None
        return {
            **answers[0],
            "wall": max(answer["wall"] for answer in answers),
            "processor": sum(answer["processor"] for answer in answers),
        }

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.communicate()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
