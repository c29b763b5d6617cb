"""Checkpoints that every rank writes its own part of, and that are checked before anything is read from them."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import distributed

from speechgpt.training import node_local, resharding
from speechgpt.training.ledger import Ledger

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TAG = "engine"
logger = logging.getLogger(__name__)


class CheckpointStore(Protocol):
    """Where checkpoints come from; where they go is the loop's `report`."""

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        """Directories of the checkpoints there are, each holding the parts of all ranks; the same for every rank."""


class DamagedCheckpoint(Exception):
    """A checkpoint that lacks a file or holds a changed one."""


class Taken(NamedTuple):
    """What a whole checkpoint says of itself."""

    step: int
    files: list[dict[str, str]]
    """{file: sha256} of each rank that wrote a part."""
    read: list[dict[str, Any]]
    """The `Ledger` of each of these ranks."""

    @property
    def world(self) -> int:
        return len(self.files)


def save(engine: "DeepSpeedEngine", directory: Path, step: int, ledger: Ledger) -> None:
    """Write this rank's part of a checkpoint taken after `step` steps; every rank calls it, each with a directory.

    The directories may be one or many: put together they are the checkpoint. The list of a rank's files is written
    last, so a part without it is known to be unfinished.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
    files = {name: _sha256(directory / name) for name in _written_by(engine, directory)}
    part = {"step": step, "world": world, "files": files, "read": ledger.state()}
    (directory / part_name(rank)).write_text(json.dumps(part, indent=1))


def restore(engine: "DeepSpeedEngine", store: CheckpointStore, ledger: Ledger) -> int:
    """Bring the engine to its newest whole checkpoint, and rank 0's ledger with it; give the number of steps it has
    done, 0 if there is none.

    A checkpoint taken by another number of workers is converted on the node's own disk. A damaged one is skipped with
    a warning.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for opened in store.newest_first():
        with opened as directory:
            problem, taken, universal = "", None, None
            try:
                taken = inspect(directory)
                if taken.world == world or not engine.zero_optimization():
                    # Hashing is as slow as reading: each rank hashes what it wrote, and rank 0's files, which all read.
                    check(directory, [taken.files[0], *taken.files[rank : rank + 1]])
                else:
                    universal = _universal(directory, taken)
            except DamagedCheckpoint as error:
                problem = str(error)
            # One rank's disk may lack what another's has: all go on together, or none does.
            if not _all_agree(not problem) or taken is None:
                logger.warning("checkpoint %s skipped: %s", directory.name, problem or "damaged for another rank")
                continue
            if universal is None:
                engine.load_checkpoint(str(directory), tag=TAG)
            else:
                resharding.load(engine, universal, TAG)
                distributed.barrier()
                node_local.forget(universal)
            if rank == 0:
                ledger.take_over(taken.read)
            return taken.step
    return 0


def inspect(directory: Path) -> Taken:
    """Read the parts' lists of files; raises DamagedCheckpoint if one is missing, or if they are not of one moment."""
    parts: list[dict[str, Any]] = []
    while not parts or len(parts) < parts[0]["world"]:
        name = part_name(len(parts))
        try:
            part = json.loads((directory / name).read_text())
            part = {key: part[key] for key in ("step", "world", "files", "read")}
        except (OSError, ValueError, KeyError, TypeError):
            raise DamagedCheckpoint(f"the part of rank {len(parts)} is missing or unfinished ({name})") from None
        parts.append(part)
    if moments := sorted({(part["step"], part["world"]) for part in parts})[1:]:
        raise DamagedCheckpoint(f"its parts are of different steps or workers, such as {(parts[0]['step'], *moments)}")
    return Taken(parts[0]["step"], [part["files"] for part in parts], [part["read"] for part in parts])


def check(directory: Path, parts: Iterable[dict[str, str]]) -> None:
    """Raises DamagedCheckpoint unless the files of these parts are there, as they were written."""
    for name, digest in {name: digest for part in parts for name, digest in part.items()}.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if _sha256(path) != digest:
            raise DamagedCheckpoint(f"{name} has changed since it was written")


def part_name(rank: int) -> str:
    return f"part-{rank}.json"


def _universal(directory: Path, taken: Taken) -> Path:
    """The checkpoint in the universal format, made once on this node, by a process that has checked all it reads."""
    # Not only the content names it: another run of the same recipe has the same content.
    names = hashlib.sha256(json.dumps([str(directory), taken.step, taken.files]).encode()).hexdigest()

    def convert(target: Path) -> None:
        check(directory, taken.files)
        logger.info("checkpoint %s of %d workers: resharding", directory.name, taken.world)
        resharding.convert(directory, TAG, target)

    return node_local.made_once(node_local.directory() / f"universal-{names[:32]}", convert)


def _written_by(engine: "DeepSpeedEngine", directory: Path) -> list[str]:
    """Files of this rank, relative to `directory`, which it may share with others."""
    mine = []
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
