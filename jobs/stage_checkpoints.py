"""The checkpoints of a stage in the workspace: uploaded beside training, listed by what is in them, tidied up.

Which checkpoints there are is read from the checkpoints themselves, not from Ray Train's index of them: a kill while
the index is written loses none, and one that was whole before Ray had entered it counts.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from speechgpt.runtime import uploads
from speechgpt.runtime.workspace import Workspace
from speechgpt.training.checkpoints import part_name

if TYPE_CHECKING:
    import ray.train

_INDEX = "checkpoint_manager_snapshot.json"

logger = logging.getLogger(__name__)


def tidy(workspace: Workspace, run: str, keep: int, say: Callable[[str], None]) -> None:
    """Remove what killed attempts left of checkpoints that were never whole, and all but the newest `keep` of the rest.

    Nobody may be training into `run` meanwhile.
    """
    workspace.delete(f"{run}/{_INDEX}")
    whole, unfinished = _found(workspace, run)
    for name in unfinished:
        say(f"{run}/{name} is not whole and is removed")
    for name in [*unfinished, *whole[keep:]]:
        workspace.delete(f"{run}/{name}")


class StageCheckpoints:
    """Those that this run of a stage, or an earlier attempt at it, has put into the workspace; for its workers."""

    def __init__(self, workspace: Workspace, run: str) -> None:
        self._workspace, self._run = workspace, run

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        """The whole ones, as rank 0 finds them."""
        import ray.train
        from ray.train.collective import broadcast_from_rank_zero

        checkpoints = None
        if ray.train.get_context().get_world_rank() == 0:
            whole, unfinished = _found(self._workspace, self._run)
            for name in unfinished:
                logger.warning("checkpoint %s/%s skipped: it is not whole", self._run, name)
            places = [self._workspace.root(f"{self._run}/{name}") for name in whole]
            checkpoints = [ray.train.Checkpoint(place, filesystem=self._workspace.fs) for place in places]
        # The objects themselves, because by them Ray knows that the workers of a node can share one download.
        for checkpoint in broadcast_from_rank_zero(checkpoints):
            yield _opened(checkpoint)


class Uploads:
    """Hands a worker's parts to Ray Train, which uploads them while training goes on."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()

    def report(self, figures: dict[str, float], directory: Path) -> None:
        """Returns when the upload has begun, so that no more than two checkpoints lie on a node's disk."""
        import ray.train

        self._free.wait()
        self._free.clear()
        ray.train.report(
            figures,
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: "ray.train.Checkpoint", name: str) -> "ray.train.Checkpoint":
        import ray.train

        storage = ray.train.get_context().get_storage()
        place = f"{storage.experiment_fs_path}/{name}"
        try:
            upload(Path(checkpoint.path), storage.storage_filesystem, place)
        finally:
            self._free.set()
        return ray.train.Checkpoint(place, filesystem=storage.storage_filesystem)


def upload(directory: Path, fs: pafs.FileSystem, place: str) -> None:
    """Copy a rank's part of a checkpoint, and see that all of it has arrived; the list of its files goes last.

    Raises OSError naming the file and the storage's reason if it is refused for half a minute.
    """
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in sorted(files, key=_is_list):
        target = f"{place}/{path.relative_to(directory).as_posix()}"
        if isinstance(fs, pafs.LocalFileSystem):
            fs.create_dir(target.rpartition("/")[0], recursive=True)
        uploads.put(path, fs, target)


def _is_list(path: Path) -> bool:
    return path.name.startswith("part-") and path.suffix == ".json"


def _found(workspace: Workspace, run: str) -> tuple[list[str], list[str]]:
    """Names of the checkpoints that have all their parts, newest first, and of those that have not."""
    contents: dict[str, set[str]] = {}
    for rel in workspace.list(run):
        name, slash, inside = rel.removeprefix(f"{run}/").partition("/")
        if slash and name.startswith("checkpoint_"):
            contents.setdefault(name, set()).add(inside)
    steps: dict[str, int] = {}
    for name, files in contents.items():
        if part_name(0) not in files:
            continue
        try:
            part = json.loads(workspace.read_bytes(f"{run}/{name}/{part_name(0)}"))
            world, step = int(part["world"]), int(part["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if files >= {part_name(rank) for rank in range(world)}:
            steps[name] = step
    whole = sorted(steps, key=lambda name: (steps[name], name), reverse=True)
    return whole, sorted(contents.keys() - steps.keys())


def _opened(checkpoint: "ray.train.Checkpoint") -> AbstractContextManager[Path]:
    @contextmanager
    def directory() -> Iterator[Path]:
        with checkpoint.as_directory() as path:
            yield Path(path)

    return directory()
