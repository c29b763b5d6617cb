"""`speechgpt cluster`: make the files that a cluster for a recipe is started from, and start and stop it on AWS."""

import json as json_module
import shlex
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import speechgpt
from jobs import ray_up
from jobs.shell import JsonOption, RecipeOption, SetOption
from jobs.submit import argument_of
from speechgpt.recipe import Recipe, RecipeError, load, shipped
from speechgpt.runtime import aws_account, dashboards
from speechgpt.runtime.aws_cluster import serving_cluster, training_cluster
from speechgpt.runtime.kubernetes_guards import guards, kustomization, redis
from speechgpt.runtime.manifests import (
    RECIPE_PATH,
    ManifestError,
    Release,
    TrainingWorkers,
    check_demand,
    ray_cluster,
    ray_job,
    ray_service,
    serve_config,
)

main = typer.Typer(
    help="Make a cluster's files from a recipe, and start and stop it on AWS.",
    no_args_is_help=True,
    add_completion=False,
)

File = Annotated[
    Path, typer.Argument(help="What `render --target aws` wrote: my-cluster/cluster.yaml.", exists=True, dir_okay=False)
]

NODE_RECIPE = "/home/speechgpt/.speechgpt/recipe.yaml"
"""Where an AWS node of the image finds a recipe that the image lacks."""
RENDER = "Made by `speechgpt cluster render`: change the recipe, not this file."
WATCH = "Made by `speechgpt cluster watch` from platform/speechgpt/runtime/dashboards.py."


class Target(StrEnum):
    kuberay = "kuberay"
    aws = "aws"


@main.command()
def render(
    target: Annotated[Target, typer.Option(help="Manifests for KubeRay, or the files of `ray up` on AWS.")],
    output: Annotated[Path, typer.Option(help="Directory to write to.", file_okay=False)],
    workspace: Annotated[str, typer.Option(help="What the RayJob works in: s3://bucket/prefix.")] = "",
    image: Annotated[
        str, typer.Option(help="Image built from infra/images/Dockerfile.", show_default="speechgpt:VERSION")
    ] = "",
    region: Annotated[str, typer.Option(help="AWS region.")] = "us-west-2",
    job: Annotated[
        list[str] | None,
        typer.Option(help="A RayJob for this job, e.g. 'train chain'; may be repeated.", show_default="pipeline"),
    ] = None,
    queue: Annotated[str, typer.Option(help="Kueue LocalQueue that admits the RayJobs.")] = "",
    recipe: RecipeOption = "nano",
    overrides: SetOption = None,
) -> None:
    """Write the manifests of a recipe's resources."""
    if target is Target.kuberay and not workspace.startswith("s3://"):
        raise typer.BadParameter("--workspace s3://bucket/prefix is missing: pods share no directory")
    jobs = job or ["pipeline"]
    for words in jobs:
        if not words.strip():
            raise typer.BadParameter("--job is empty: name a job, e.g. tokenize or 'train chain'")
        argument_of(*words.split(maxsplit=1))
    try:
        resolved = load(recipe, tuple(overrides or ()))
        in_image = recipe in shipped() and not overrides
        release = Release(
            name=resolved.name,
            image=image or f"speechgpt:{speechgpt.__version__}",
            ray_version=metadata.version("ray"),
            recipe_yaml=None if in_image else resolved.yaml(),
        )
        check_resources(resolved)
        if target is Target.aws:
            files = aws_files(resolved, release, region, output)
        else:
            files = kuberay_files(resolved, release, workspace, jobs, queue)
    except (RecipeError, ManifestError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text)
        typer.echo(output / name)


@main.command()
def account(
    bucket: Annotated[str, typer.Option(help="Name of the workspace's bucket; made, or set up anew if it is there.")],
    region: Annotated[str, typer.Option(help="AWS region.")] = "us-west-2",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print bucket, roles and rights as JSON; change nothing.")
    ] = False,
) -> None:
    """Make the bucket and the roles that `cluster up` needs on AWS."""
    import boto3

    session = boto3.Session(region_name=region)
    try:
        wanted = aws_account.plan(bucket, region, aws_account.account_of(session))
        if dry_run:
            typer.echo(json_module.dumps(wanted.document(), indent=2))
            return
        for step in aws_account.apply(wanted, session):
            typer.echo(step)
    except aws_account.AccountError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@main.command()
def watch(output: Annotated[Path, typer.Option(help="Directory to write to.", file_okay=False)]) -> None:
    """Write Prometheus' configuration, alert rules and Grafana dashboards."""
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "prometheus.yml": _yaml([dashboards.prometheus()], WATCH),
        "alerts.yml": _yaml([dashboards.alert_rules()], WATCH),
    }
    for name in dashboards.DASHBOARDS:
        files[f"{name}.json"] = json_module.dumps(dashboards.grafana(name), indent=2) + "\n"
    for name, text in files.items():
        (output / name).write_text(text)
        typer.echo(output / name)


@main.command()
def up(file: File) -> None:
    """Start the cluster, or bring a running one to what the file says."""
    _ends_as(ray_up.up(file))


@main.command()
def down(file: File, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Terminate all machines of the cluster; the workspace stays."""
    _ends_as(ray_up.down(file, yes))


@main.command()
def status(file: File, json: JsonOption = False) -> None:
    """Say which machines the cluster has."""
    try:
        nodes = ray_up.nodes(file)
    except ray_up.RayUpError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(json_module.dumps({"cluster": ray_up.name(file), "nodes": nodes}))
        return
    if not nodes:
        typer.echo(f"{ray_up.name(file)} has no machines; start it: speechgpt cluster up {file}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*nodes[0], box=None)
    for node in nodes:
        table.add_row(*(str(value) for value in node.values()))
    Console().print(table)


def check_resources(recipe: Recipe) -> None:
    """Raises ManifestError for resources that no cluster of this recipe could give."""
    engine = recipe.engine
    training = TrainingWorkers(engine.least_workers, engine.cpus_per_worker, engine.gpus_per_worker)
    check_demand(recipe.resources, recipe.serving, training)


def aws_files(recipe: Recipe, release: Release, region: str, output: Path) -> dict[str, str]:
    """{file name: YAML} that is to lie in `output`; a recipe that the image lacks is mounted from there."""
    source = recipe.name
    mounts: dict[str, str] = {}
    if release.recipe_yaml is not None:
        source = NODE_RECIPE
        mounts = {NODE_RECIPE: str(output.absolute() / "recipe.yaml")}
    serving = serving_cluster(release, recipe.resources, recipe.serving, region)
    serving["file_mounts"] |= mounts
    files = {
        "cluster.yaml": _yaml([training_cluster(release, recipe.resources, region)]),
        "serving.yaml": _yaml([serving]),
        "serve.yaml": _yaml([serve_config(_arguments(recipe, source), recipe.serving)]),
    }
    return files | ({"recipe.yaml": release.recipe_yaml} if release.recipe_yaml is not None else {})


def kuberay_files(recipe: Recipe, release: Release, workspace: str, jobs: list[str], queue: str) -> dict[str, str]:
    """{file name: YAML}"""
    source = recipe.name if release.recipe_yaml is None else RECIPE_PATH
    resources, serving = recipe.resources, recipe.serving
    files = {}
    for job in jobs:
        command = ["speechgpt", *shlex.split(job), "--recipe", source, "--workspace", workspace]
        suffix = "" if job == "pipeline" else "-" + job.replace(" ", "-")
        files[f"rayjob{suffix}.yaml"] = _yaml(ray_job(release, command, resources, job, queue))
    shared = {
        "guards.yaml": _yaml(guards(release, serving.port)),
        "redis.yaml": _yaml(redis(release)),
        "rayservice.yaml": _yaml(ray_service(release, _arguments(recipe, source), resources, serving)),
    }
    files["raycluster.yaml"] = _yaml(ray_cluster(release, resources))
    # A RayJob is created anew for each run, and a standing cluster only by who wants one.
    return files | shared | {"kustomization.yaml": _yaml([kustomization(list(shared))])}


def _arguments(recipe: Recipe, source: str) -> dict[str, Any]:
    """Of the builders in serve/app.py."""
    model = recipe.tracking.registered_model or f"speechgpt-{recipe.name}"
    return {"bundle": f"models:/{model}@champion", "recipe": source}


def _ends_as(code: int) -> None:
    if code:
        raise typer.Exit(1)


def _yaml(documents: list[dict[str, Any]], origin: str = RENDER) -> str:
    class Dumper(yaml.SafeDumper):
        """Shows text of several lines as such, and nothing by reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    body = yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=120)
    return f"# {origin}\n{body}"


if __name__ == "__main__":
    main()
