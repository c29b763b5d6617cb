"""Checkpoints that every rank writes its own part of, and that are checked before anything is read from them."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TAG = "engine"
logger = logging.getLogger(__name__)


class CheckpointStore(Protocol):
    """Where checkpoints come from; where they go is the loop's `report`."""

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        """Directories of the checkpoints there are, each holding the parts of all ranks."""


class DamagedCheckpoint(Exception):
    """A checkpoint that lacks a file or holds a changed one."""


def save(engine: "DeepSpeedEngine", directory: Path, step: int) -> None:
    """Write this rank's part of a checkpoint taken after `step` steps; every rank calls it, each with a directory.

    The directories may be one or many: put together they are the checkpoint. The list of a rank's files is written
    last, so a part without it is known to be unfinished.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    save_file(state, directory / f"rng-{rank}.safetensors")
    files = {name: _sha256(directory / name) for name in _written_by(engine, directory, rank)}
    part = {"step": step, "world": world, "files": files}
    (directory / _part(rank)).write_text(json.dumps(part, indent=1))


def restore(engine: "DeepSpeedEngine", store: CheckpointStore) -> int:
    """Bring the engine to its newest whole checkpoint; give the number of steps it has done, 0 if there is none.

    A damaged checkpoint is skipped with a warning. Raises ValueError for one taken with another number of workers.
    """
    for opened in store.newest_first():
        with opened as directory:
            try:
                step = verify(directory, distributed.get_rank(), distributed.get_world_size())
                problem = ""
            except DamagedCheckpoint as error:
                step, problem = 0, str(error)
            # One rank's disk may lack what another's has: all go on together, or none does.
            if not _all_agree(not problem):
                logger.warning("checkpoint %s skipped: %s", directory.name, problem or "damaged for another rank")
                continue
            engine.load_checkpoint(str(directory), tag=TAG)
            state = load_file(directory / f"rng-{distributed.get_rank()}.safetensors")
            torch.set_rng_state(state["cpu"])
            if "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"])
            return step
    return 0


def verify(directory: Path, rank: int, world: int) -> int:
    """Check that all parts are there and that the files this rank reads are what was written; give the step.

    Raises DamagedCheckpoint, or ValueError when the checkpoint was taken with another number of workers.
    """
    steps = set()
    for other in range(world):
        try:
            part = json.loads((directory / _part(other)).read_text())
        except (OSError, ValueError):
            raise DamagedCheckpoint(f"the part of rank {other} is missing or unfinished ({_part(other)})") from None
        if part["world"] != world:
            raise ValueError(
                f"checkpoint {directory} was taken with {part['world']} workers and cannot go on with {world}: "
                f"set engine.workers to {part['world']}, or remove the stage's checkpoints to start it again"
            )
        steps.add(part["step"])
        for name, digest in part["files"].items():
            path = directory / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{name} is missing")
            # Hashing is as slow as reading: each rank hashes what it wrote, and rank 0's files, which all read.
            if other in (rank, 0) and _sha256(path) != digest:
                raise DamagedCheckpoint(f"{name} has changed since it was written")
    if len(steps) != 1:
        raise DamagedCheckpoint(f"the ranks' parts are of different steps {sorted(steps)}")
    return steps.pop()


def _part(rank: int) -> str:
    return f"part-{rank}.json"


def _written_by(engine: "DeepSpeedEngine", directory: Path, rank: int) -> list[str]:
    """Files of this rank, relative to `directory`, which it may share with others."""
    mine = [directory / f"rng-{rank}.safetensors"]
    if engine.save_non_zero_checkpoint:
        mine.append(Path(engine._get_ckpt_name(str(directory), TAG)))
    if engine.save_zero_checkpoint:
        mine.append(Path(engine._get_zero_ckpt_name(str(directory), TAG)))
    return [str(path.relative_to(directory)) for path in mine]


def _all_agree(mine: bool) -> bool:
    flag = torch.tensor([int(mine)])
    if distributed.get_backend() == "nccl":
        flag = flag.cuda()
    distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
    return bool(flag.item())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
