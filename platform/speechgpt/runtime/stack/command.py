"""`speechgpt stack`: PostgreSQL, MLflow and an S3 server on this machine, for development."""

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from speechgpt.runtime.stack.layout import Layout, StackError, default_directory

main = typer.Typer(
    help="Tracking and storage on this machine, for development.", no_args_is_help=True, add_completion=False
)

Directory = Annotated[
    Path, typer.Option("--directory", help="Where the stack keeps its files.", default_factory=default_directory)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]


@main.command()
def up(
    directory: Directory,
    postgres_port: Annotated[int, typer.Option()] = 5433,
    mlflow_port: Annotated[int, typer.Option()] = 5000,
    s3_port: Annotated[int, typer.Option()] = 9000,
) -> None:
    """Start PostgreSQL, the S3 server and MLflow, on loopback."""
    from speechgpt.runtime.stack import services

    layout = Layout(directory.absolute(), postgres_port, mlflow_port, s3_port)
    with _reported():
        for step in services.up(layout):
            typer.echo(step, err=True)
        _remember(layout)
    for name, value in layout.environment().items():
        typer.echo(f"export {name}={value}")


@main.command()
def down(directory: Directory) -> None:
    """Stop what `up` started; everything is kept for the next time."""
    from speechgpt.runtime.stack import services

    with _reported():
        for step in services.down(_layout(directory)):
            typer.echo(step, err=True)


@main.command()
def status(directory: Directory, json: Json = False) -> None:
    """Say which servers run, and how to reach them; exit code 1 unless all do."""
    from speechgpt.runtime.stack import services

    layout = _layout(directory)
    servers = services.status(layout)
    if json:
        typer.echo(json_module.dumps({"servers": servers, "environment": layout.environment()}))
    else:
        for name, runs in servers.items():
            typer.echo(f"{name}: {'runs' if runs else 'does not run'}")
    raise typer.Exit(0 if all(servers.values()) else 1)


@main.command()
def backup(destination: Annotated[Path, typer.Argument(help="A new directory.")], directory: Directory) -> None:
    """Copy MLflow's database and every object into a directory, while the stack runs."""
    from speechgpt.runtime.stack import backup as backups

    with _reported():
        count = backups.backup(_layout(directory), destination)
        typer.echo(f"{destination}: the database and {count} objects", err=True)


@main.command()
def restore(source: Annotated[Path, typer.Argument(help="What `backup` wrote.")], directory: Directory) -> None:
    """Put a backup in place of what the running stack holds."""
    from speechgpt.runtime.stack import backup as backups

    with _reported():
        count = backups.restore(_layout(directory), source)
        typer.echo(f"restored the database and {count} objects", err=True)


def _remember(layout: Layout) -> None:
    """The ports that `up` was given, for the other verbs."""
    ports = {"postgres_port": layout.postgres_port, "mlflow_port": layout.mlflow_port, "s3_port": layout.s3_port}
    (layout.directory / "ports.json").write_text(json_module.dumps(ports))


def _layout(directory: Path) -> Layout:
    directory = directory.absolute()
    ports = directory / "ports.json"
    return Layout(directory, **(json_module.loads(ports.read_text()) if ports.exists() else {}))


@contextmanager
def _reported() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        typer.echo(f"error: the S3 server of the stack did not do what it was asked: {error}", err=True)
        raise typer.Exit(1) from None
    except StackError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
