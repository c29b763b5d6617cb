"""The `speechgpt` command. It knows none of its verbs: they are the entry points of the group `speechgpt.commands`.

A verb's module is imported when the verb is used, not before: torch and Ray take seconds, `--help` must not. The line
that `--help` shows is read from the verb's own docstring without importing it.
"""

import ast
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import speechgpt

GROUP = "speechgpt.commands"


class Verbs(TyperGroup):
    """A command group with a placeholder for each entry point, exchanged for the command itself when it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._entries = {entry.name: entry for entry in entry_points(group=GROUP)}
        for name in sorted(self._entries):
            package = self._entries[name].module.partition(".")[0]
            self.add_command(TyperCommand(name, rich_help_panel=package))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for name, placeholder in self.commands.items():
            placeholder.help = summary(self._entries[name])
        super().format_help(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, placeholder and _command(self._entries[str(name)]), rest


def summary(entry: EntryPoint) -> str:
    """First line of the docstring of the verb's function, else of its module; nothing is imported but its package."""
    spec = find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    module = ast.parse(Path(spec.origin).read_bytes())
    functions = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == entry.attr)
    own = [ast.get_docstring(function) for function in functions]
    text = next(filter(None, own), ast.get_docstring(module)) or ""
    # "Job `manifest`: check the recordings" says the name once more.
    line = text.partition("\n")[0].rpartition("`: ")[2].rstrip(".")
    return line[:1].upper() + line[1:]


def main() -> None:
    """Entry point of the console script."""
    app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback(help=speechgpt.__doc__)(_options)
    app(prog_name="speechgpt")


def _command(entry: EntryPoint) -> Any:
    """Import the verb: a Typer application, or a function with Typer's annotations."""
    target = entry.load()
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        target.command(entry.name)(function)
    return typer.main.get_command(target)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"speechgpt {speechgpt.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options of the command itself."""


if __name__ == "__main__":
    main()
