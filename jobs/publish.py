"""Jobs `publish` and `promote`: what training made becomes a bundle, a registered model, and the one that is served.

`publish` writes `bundles/NAME` (NAME is the recipe's) and registers it in MLflow. `promote` lets an alias name that
version; inside the pipeline it runs after `evaluate`, so that nothing is served under `champion` that was not measured.
As a command it also takes a running service over to the bundle, and the alias moves once that serves.
"""

import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import entry_points
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
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking, pin, revision, store_of
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
    tracking, version, digest = _version(recipe, workspace)
    tracking.promote(alias, version)
    return {
        "model": f"models:/{tracking.model}@{alias}",
        "alias": alias,
        "version": int(version),
        "bundle_digest": digest,
    }


def _version(recipe: Recipe, workspace: Workspace) -> tuple[Tracking, str, str]:
    """(where it is registered, version, digest) of the workspace's bundle. Raises JobError if there is none."""
    if not workspace.exists(bundle_path(recipe)):
        raise JobError(f"{workspace.path(bundle_path(recipe))} is missing: run publish first")
    digest = workspace.read_json(f"{bundle_path(recipe)}/bundle.json")["digest"]
    tracking = Tracking.open(recipe.tracking, workspace, recipe.name)
    version = tracking.version_of(digest)
    if version is None:
        raise JobError(
            f"no version of {tracking.model} has the digest of {workspace.path(bundle_path(recipe))}: run publish first"
        )
    return tracking, version, digest


def _run_promote(context: Context) -> dict[str, Any]:
    promoted = promote(context.recipe, context.workspace, CHAMPION)
    context.workspace.write_json("bundles/promoted.json", promoted)
    return {"figures": promoted, "outputs": ["bundles/promoted.json"]}


@dataclass(frozen=True)
class RegistryAlias:
    """An alias of a registered model, by the digests of what it names. Without a registry nothing is named."""

    tracking: Tracking | None
    alias: str

    def move(self, digest: str) -> None:
        if self.tracking and (version := self.tracking.version_of(digest)):
            self.tracking.promote(self.alias, version)

    def leave(self, new: str, old: str) -> None:
        if self.tracking is None or (version := self.tracking.version_of(new)) is None:
            return
        if self.tracking.version_named(self.alias) == version:
            self.move(old)


def promote_command(
    bundle: Annotated[
        str, typer.Argument(help="As `serve` takes it: s3://…, models:/name/version …", show_default="the workspace's")
    ] = "",
    recipe: RecipeOption = "nano",
    workspace: WorkspaceOption = "",
    alias: Annotated[str, typer.Option(help="Alias of the registered model, as in models:/name@alias.")] = CHAMPION,
    address: Annotated[
        str,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster (host:port, auto) whose service goes over to the bundle."),
    ] = "",
    canary: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the requests that try it first.")] = 0.1,
    watch_seconds: Annotated[float, typer.Option(min=1, help="How long it is tried so, and then with all.")] = 60.0,
    requests: Annotated[int, typer.Option(min=0, help="How many requests must have tried it by then.")] = 20,
    patience_seconds: Annotated[float, typer.Option(min=1, help="How long these are waited for.")] = 600.0,
    slower: Annotated[float, typer.Option(min=1, help="How many times as late its first sound may come.")] = 1.5,
    deploy_seconds: Annotated[float, typer.Option(min=1, help="How long it may take to come up.")] = 900.0,
    abort: Annotated[bool, typer.Option("--abort", help="Take back what a promotion that was killed left.")] = False,
    state: Annotated[bool, typer.Option("--state", help="Say which bundle serves and which is on trial.")] = False,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Let an alias name a bundle, and a running service go over to it: beside the old one, then a share, then all."""
    with verb(json) as answer:
        resolved = load(recipe, tuple(set or ()))
        place = Workspace(workspace or f"runs/{resolved.name}")
        if not address:
            if bundle or abort or state:
                raise JobError("which service? Name its Ray cluster by --address or RAY_ADDRESS")
            answer({"figures": promote(resolved, place, alias)})
            return
        service = _service()
        service.join(address)
        if not service.has_service() and not (bundle or abort or state):
            # A cluster that only trains.
            answer({"figures": promote(resolved, place, alias)})
            return
        if state:
            answer({"figures": service.state()})
            return
        progress = Progress(silent=json)
        if abort and not (bundle or workspace):
            answer({"figures": service.abort(RegistryAlias(None, alias), progress.say)})
            return
        tracking, found = _registered(bundle, resolved, place)
        named = RegistryAlias(tracking, alias)
        if abort:
            answer({"figures": service.abort(named, progress.say)})
            return
        terms = service.Terms(canary, watch_seconds, requests, patience_seconds, slower=slower)
        uri = tracking.uri if tracking else resolved.tracking.uri
        answer({"figures": service.roll_out(found, uri, named, terms, deploy_seconds, progress.say)})


def _registered(bundle: str, recipe: Recipe, workspace: Workspace) -> tuple[Tracking | None, str]:
    """(where the bundle is registered, or None; its address). Without `bundle` it is the workspace's.

    Raises JobError if the workspace has none, TrackingError if there is no such model.
    """
    if bundle.startswith("models:/"):
        address = pin(bundle, recipe.tracking.uri)
        name = address.removeprefix("models:/").partition("/")[0]
        return Tracking(store_of(address, recipe.tracking.uri), "", name), address
    if bundle:
        return None, bundle
    tracking, version, _ = _version(recipe, workspace)
    return tracking, f"models:/{tracking.model}/{version}"


def _service() -> Any:
    """The module that knows running services: jobs import nothing of `serve`."""
    for entry in entry_points(group="speechgpt.services", name="serve"):
        return entry.load()
    raise JobError("this installation has no services: install speechgpt-ray again")


JOB = Job(name="publish", part="bundles", run=run, reads=_reads, sections=("generation",))
PROMOTE = Job(name="promote", part="bundles", run=_run_promote, reads=("publish", "evaluate"))
main = command(JOB)

if __name__ == "__main__":
    main()
