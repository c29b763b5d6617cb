"""Jobs `publish` and `promote`: what training made becomes a bundle, a registered model, and the one that is served.

`publish` writes `bundles/NAME` (NAME is the recipe's) and registers it in MLflow. `promote` lets an alias name that
version; inside the pipeline it runs after `evaluate`, so that nothing is served under `champion` that was not measured.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.shell import (
    PARTS,
    Context,
    Job,
    JobError,
    JsonOption,
    RecipeOption,
    SetOption,
    WorkspaceOption,
    command,
    verb,
)
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.tracking import Tracking, revision
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.runtime.bundle import Bundle

CHAMPION = "champion"
"""The alias that the pipeline promotes to."""
_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "unit_config.json",
    "kmeans.safetensors",
)
_VOCODER_FILES = ("config.json", "model.safetensors")


def bundle_path(recipe: Recipe) -> str:
    """The bundle's name in the workspace."""
    return f"bundles/{recipe.name}"


def stages(recipe: Recipe) -> tuple[str, str | None]:
    """(stage whose whole model is served, stage whose LoRA adapter goes on top or None): the end of the recipe's chain.

    Raises JobError if the last stage's adapter belongs on another model.
    """
    whole = [name for name, stage in recipe.stages.items() if stage.lora is None]
    last, stage = list(recipe.stages.items())[-1]
    if not whole:
        raise JobError(f"recipe {recipe.name}: every stage is a LoRA; a bundle needs the whole model that they go on")
    if stage.lora is None:
        return last, None
    if stage.start_from != whole[-1]:
        raise JobError(f"stages.{last}.start_from: {stage.start_from!r}, but the last whole model is {whole[-1]!r}")
    return whole[-1], last


def run(context: Context) -> dict[str, Any]:
    recipe, workspace = context.recipe, context.workspace
    name = bundle_path(recipe)
    with workspace.stage(name) as folder:
        bundle = assemble(recipe, workspace, folder)
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    with workspace.fetch(name) as directory:
        version = tracking.register_bundle(context.run, directory, bundle.digest)
    context.run.log_params({"bundle_digest": bundle.digest, "model_version": version})
    context.progress.say(f"registered {tracking.model} version {version}, bundle {bundle.digest[:12]}")
    figures = {
        "version": int(version),
        "bundle_digest": bundle.digest,
        "megabytes": round(sum(len(workspace.read_bytes(file)) for file in workspace.list(name)) / 1e6, 2),
    }
    return {"figures": figures, "outputs": [name]}


def assemble(recipe: Recipe, workspace: Workspace, folder: Path) -> "Bundle":
    """Write the bundle into an empty directory from what the jobs left."""
    from speechgpt.runtime import bundle
    from speechgpt.speech.encoder import SpeechEncoder

    language, adapter = stages(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        parts = {
            "encoder": _take(workspace, "encoder", _ENCODER_FILES, Path(temporary)),
            "vocoder": _take(workspace, "vocoder", _VOCODER_FILES, Path(temporary)),
            "language": _take(workspace, f"models/{language}", None, Path(temporary)),
        }
        if adapter:
            parts["adapter"] = _take(workspace, f"models/{adapter}", None, Path(temporary))
        encoder = SpeechEncoder.load(parts["encoder"])
        units = {"name": encoder.name, "size": encoder.clusters, "frames_per_second": 50, "merged": True}
        return bundle.write(folder, parts, units, lineage(recipe, workspace))


def lineage(recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """What the bundle was made from: code revision, resolved recipe, and each finished job's run and output digest."""
    markers = [f"{part}/_done/" for part in PARTS]
    jobs = {}
    for file in (
        name for part, top in zip(PARTS, markers, strict=True) for name in workspace.list(part) if name.startswith(top)
    ):
        if file.endswith(".json") and not file.endswith(".started.json"):
            done = workspace.read_json(file)
            jobs[done["job"]] = {"run_id": done["run_id"], "digest": done["digest"]}
    return {"revision": revision(), "recipe": recipe.yaml(), "jobs": jobs}


def _take(workspace: Workspace, part: str, names: tuple[str, ...] | None, temporary: Path) -> Path:
    """A copy of a part's own files, without what else lies beside them. Raises JobError for a missing one."""
    target = temporary / part
    with workspace.fetch(part) as source:
        files = [source / name for name in names] if names else [file for file in source.rglob("*") if file.is_file()]
        for file in files:
            if not file.is_file():
                raise JobError(f"{workspace.path(part)}/{file.name} is missing: the bundle's {part} is not complete")
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    return target


def _reads(recipe: Recipe, _argument: str | None) -> tuple[str, ...]:
    language, adapter = stages(recipe)
    trained = [f"train-{stage}" for stage in (language, adapter) if stage]
    return ("train-encoder", "fit-units", *trained, "train-vocoder")


def promote(recipe: Recipe, workspace: Workspace, alias: str) -> dict[str, Any]:
    """Let `alias` name the registered version of the workspace's bundle. Raises JobError if there is none."""
    if not workspace.exists(bundle_path(recipe)):
        raise JobError(f"{workspace.path(bundle_path(recipe))} is missing: run publish first")
    digest = workspace.read_json(f"{bundle_path(recipe)}/bundle.json")["digest"]
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    version = tracking.version_of(digest)
    if version is None:
        raise JobError(
            f"no version of {tracking.model} has the digest of {workspace.path(bundle_path(recipe))}: run publish first"
        )
    tracking.promote(alias, version)
    return {
        "model": f"models:/{tracking.model}@{alias}",
        "alias": alias,
        "version": int(version),
        "bundle_digest": digest,
    }


def _run_promote(context: Context) -> dict[str, Any]:
    promoted = promote(context.recipe, context.workspace, CHAMPION)
    context.workspace.write_json("bundles/promoted.json", promoted)
    return {"figures": promoted, "outputs": ["bundles/promoted.json"]}


def promote_command(
    recipe: RecipeOption = "nano",
    workspace: WorkspaceOption = "",
    alias: Annotated[str, typer.Option(help="Alias of the registered model, as in models:/name@alias.")] = CHAMPION,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Let an alias name the workspace's bundle, for `serve models:/name@alias`."""
    with verb(json) as answer:
        resolved = load(recipe, tuple(set or ()))
        answer({"figures": promote(resolved, Workspace(workspace or f"runs/{resolved.name}"), alias)})


JOB = Job(name="publish", part="bundles", run=run, reads=_reads, sections=("generation",))
PROMOTE = Job(name="promote", part="bundles", run=_run_promote, reads=("publish", "evaluate"))
main = command(JOB)

if __name__ == "__main__":
    main()
