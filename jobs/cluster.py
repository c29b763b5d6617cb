"""`speechgpt cluster`: the files that a cluster for a recipe is made from."""

from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import speechgpt
from jobs.shell import RecipeOption, SetOption
from speechgpt.recipe import Recipe, RecipeError, load, shipped
from speechgpt.runtime.manifests import (
    RECIPE_PATH,
    ManifestError,
    Release,
    TrainingWorkers,
    aws_cluster,
    check_demand,
    ray_job,
    ray_service,
)

main = typer.Typer(help="Make the files that a cluster for a recipe is started from.", no_args_is_help=True)


class Target(StrEnum):
    kuberay = "kuberay"
    aws = "aws"


@main.callback()
def _group() -> None:
    """Keeps `render` a command of its own while it is the only one."""


@main.command()
def render(
    target: Annotated[Target, typer.Option(help="RayJob and RayService for KubeRay, or the file of `ray up` on AWS.")],
    output: Annotated[Path, typer.Option(help="Directory to write to.", file_okay=False)],
    workspace: Annotated[str, typer.Option(help="What the RayJob works in: s3://bucket/prefix.")] = "",
    image: Annotated[
        str, typer.Option(help="Image built from infra/images/Dockerfile.", show_default="speechgpt:VERSION")
    ] = "",
    region: Annotated[str, typer.Option(help="AWS region.")] = "us-west-2",
    recipe: RecipeOption = "nano",
    overrides: SetOption = None,
) -> None:
    """Write the manifests of a recipe's resources."""
    if target is Target.kuberay and not workspace:
        raise typer.BadParameter("--workspace is missing: pods share no directory, so name s3://bucket/prefix")
    try:
        resolved = load(recipe, tuple(overrides or ()))
        in_image = recipe in shipped() and not overrides
        release = Release(
            name=resolved.name,
            image=image or f"speechgpt:{speechgpt.__version__}",
            ray_version=metadata.version("ray"),
            recipe_yaml=None if in_image else resolved.yaml(),
        )
        files = manifests(target, resolved, release, workspace, region)
    except (RecipeError, ManifestError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text)
        typer.echo(output / name)


def manifests(target: Target, recipe: Recipe, release: Release, workspace: str, region: str) -> dict[str, str]:
    """{file name: YAML}. Raises ManifestError for resources that no such cluster could give."""
    engine, resources, serving = recipe.engine, recipe.resources, recipe.serving
    training = TrainingWorkers(engine.least_workers, engine.cpus_per_worker, engine.gpus_per_worker)
    check_demand(resources, serving, training)
    if target is Target.aws:
        return {"cluster.yaml": _yaml([aws_cluster(release, resources, region)])}
    source = recipe.name if release.recipe_yaml is None else RECIPE_PATH
    command = ["speechgpt", "pipeline", "--recipe", source, "--workspace", workspace]
    model = recipe.tracking.registered_model or f"speechgpt-{recipe.name}"
    application = {
        "name": "speechgpt",
        "import_path": "serve.app:build",
        "route_prefix": "/",
        "args": {"bundle": f"models:/{model}@champion", "recipe": source},
    }
    return {
        "rayjob.yaml": _yaml(ray_job(release, command, resources)),
        "rayservice.yaml": _yaml(ray_service(release, application, resources, serving)),
    }


def _yaml(documents: list[dict[str, Any]]) -> str:
    class Dumper(yaml.SafeDumper):
        """Shows text of several lines as such, and nothing by reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    body = yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=120)
    return f"# Made by `speechgpt cluster render`: change the recipe, not this file.\n{body}"


if __name__ == "__main__":
    main()
