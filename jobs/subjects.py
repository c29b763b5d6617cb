"""Who is examined, by `evaluate` and `evaluate-instructions`: a bundle, and the models that training stages left."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from jobs.shell import JobError
from speechgpt.recipe import Recipe
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.runtime.bundle import Bundle

BundleOption = Annotated[
    str, typer.Option(help="Directory, s3://…, models:/name@alias, or a shipped name, in place of the workspace's.")
]


@dataclass(frozen=True)
class Subject:
    """The language model that a stage left, and the adapter on top of it (names in the workspace)."""

    stage: str
    workspace: Workspace
    model: str
    adapter: str | None = None


@dataclass(frozen=True)
class Served:
    """A bundle by an address that every node can resolve, and the MLflow store of a `models:/` one."""

    address: str
    store: str = ""

    @classmethod
    def at(cls, address: str) -> "Served":
        """As Ray's workers find it, who stand in other directories, perhaps on nodes without this environment."""
        absolute = str(Path(address).absolute()) if Path(address).is_dir() else address
        return cls(absolute, os.environ.get("MLFLOW_TRACKING_URI", ""))

    def opened(self) -> "Bundle":
        """On this machine. Raises BundleError."""
        from speechgpt.runtime import bundle

        return bundle.load(self.address, self.store)


def recipe_of(bundle: "Bundle", address: str, manifest: str) -> dict[str, Any] | None:
    """The recipe that made a bundle, as it was written, without `serving`: how a bundle was to be served is nothing to
    those who ask it, and in an older one that section may have had other keys. Raises JobError where neither it nor a
    manifest says what to ask."""
    made_by = bundle.manifest["lineage"].get("recipe")
    if not made_by and not manifest:
        raise JobError(f"bundle {address} names no recipe whose questions could be asked: give a --manifest")
    if not made_by:
        return None
    return {name: section for name, section in yaml.safe_load(made_by).items() if name != "serving"}


def refuse_lone_manifest(bundle: str, manifest: str) -> None:
    """Raises typer.BadParameter."""
    if manifest and not bundle:
        raise typer.BadParameter("--manifest needs --bundle; without both, the workspace's bundle is evaluated")


def stage_subjects(recipe: Recipe, workspace: Workspace) -> list[Subject]:
    """The untrained model, then what each stage left, in order; a LoRA stage is its adapter on what it started from."""
    starts = [f"checkpoints/{name}/start" for name in recipe.stages]
    untrained = [Subject("untrained", workspace, start) for start in starts if workspace.exists(start)]
    return untrained + [
        Subject(
            name,
            workspace,
            f"models/{stage.start_from if stage.lora else name}",
            f"models/{name}" if stage.lora else None,
        )
        for name, stage in recipe.stages.items()
    ]
