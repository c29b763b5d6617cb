"""`speechgpt plan`: what a recipe's stages take on given GPUs, before any is rented.

Exit code 1 if a stage cannot fit; what would make it fit is said.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.shell import JsonOption, RecipeOption, SetOption, verb
from speechgpt.recipe import Recipe, RecipeError, load

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from speechgpt.training.hardware import HardwareSection, Machines
    from speechgpt.training.plan import StagePlan


def main(
    gpus: Annotated[
        str,
        typer.Option(help="Count and kind of the table: 16xA100-80, 2xCPU.", show_default="the recipe's workers"),
    ] = "",
    prices: Annotated[
        Path | None, typer.Option(help="Your table of GPUs, speeds and prices (YAML).", show_default="the shipped one")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that is assumed.", min=0.01, max=1, show_default="table's")
    ] = None,
    recipe: RecipeOption = "nano",
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a recipe's stages take: memory, hours, money, storage; exit code 1 if they cannot fit."""
    with verb(json) as answer:
        resolved = load(recipe, tuple(overrides or ()))
        plans, table, machines = make(resolved, gpus, prices, mfu)
        if json:
            answer(as_json(resolved, plans, table, machines))
        else:
            show(resolved, plans, table, machines)
    raise typer.Exit(0 if all(plan.fits for plan in plans) else 1)


def make(
    recipe: Recipe, gpus: str, prices: Path | None, mfu: float | None
) -> "tuple[list[StagePlan], HardwareSection, Machines]":
    """A plan of each stage. Raises RecipeError or HardwareError for what cannot be planned."""
    from speechgpt.training import hardware
    from speechgpt.training.plan import Sizes, plan

    table = hardware.load(prices)
    if mfu is not None:
        table = table.model_copy(update={"mfu": mfu})
    machines = hardware.parse(gpus or _recipe_s(recipe, table), table)
    sizes = Sizes(grown(recipe))
    stages = recipe.stages.items()
    return [plan(name, sizes, recipe.engine, stage, machines, table) for name, stage in stages], table, machines


def _recipe_s(recipe: Recipe, table: "HardwareSection") -> str:
    """The recipe's own workers in the table's words."""
    if not recipe.engine.gpus_per_worker:
        return f"{recipe.engine.most_workers}xCPU"
    name = recipe.resources.accelerator.removesuffix("G")
    if name not in table.gpus:
        raise RecipeError(
            f"recipe {recipe.name}: resources.accelerator {recipe.resources.accelerator!r} is none of "
            f"{sorted(table.gpus)}: say --gpus COUNTxKIND"
        )
    return f"{recipe.engine.most_workers}x{name}"


def grown(recipe: Recipe) -> "PretrainedConfig":
    """The configuration of the recipe's model with units and markers in its vocabulary. Nothing is loaded."""
    from speechgpt.language.segments import RELEASED_MARKERS, TAG_MARKERS

    language = recipe.language
    config, is_grown = base_config(recipe)
    if not is_grown:
        markers = len(RELEASED_MARKERS) + (len(TAG_MARKERS) if language.markers == "whole" else 0)
        size = config.vocab_size + recipe.codebook.clusters + markers
        config.vocab_size = -(-size // language.pad_vocabulary_to) * language.pad_vocabulary_to
    return config


def base_config(recipe: Recipe) -> "tuple[PretrainedConfig, bool]":
    """The base's configuration, and whether its vocabulary has grown already.

    A base that is not at hand is taken to be what `language.architecture` says, if that has a `vocab_size`.
    """
    from importlib import resources

    from transformers import AutoConfig, LlamaConfig

    from speechgpt.language.vocabulary import FILE
    from speechgpt.runtime.workspace import Workspace, WorkspaceError
    from speechgpt.training import pretrained

    base, architecture = recipe.language.base, recipe.language.architecture
    if base == "scratch":
        return LlamaConfig(**{**architecture, "vocab_size": recipe.language.text_vocabulary}), False
    if base == "shipped":
        return AutoConfig.from_pretrained(str(resources.files("speechgpt") / "bundles" / "nano" / "language")), True
    try:
        if base.startswith("s3://"):
            place = Workspace(base)
            found = place.read_json("config.json")
            return AutoConfig.for_model(**found), place.exists(FILE)
        name, options = pretrained.locate(base)
        if base.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise FileNotFoundError(f"{base}: no such directory")
        return AutoConfig.from_pretrained(name, **options), Path(name, FILE).is_file()
    except (OSError, ModuleNotFoundError, WorkspaceError) as error:
        if "vocab_size" not in architecture:
            raise RecipeError(
                f"recipe {recipe.name}: language.base {base!r} is not at hand ({error}); to plan without it, give its "
                "shape in language.architecture: vocab_size, hidden_size, intermediate_size, num_hidden_layers, …"
            ) from None
        return LlamaConfig(**architecture), False


def as_json(recipe: Recipe, plans: "list[StagePlan]", table: "HardwareSection", machines: "Machines") -> dict[str, Any]:
    """The whole plan; sizes in bytes."""
    return {
        "recipe": recipe.name,
        "machines": {"count": machines.number, "kind": machines.name, "usable_bytes": machines.usable_bytes(table)},
        "assumed": {"mfu": table.mfu, "prices": table.prices.model_dump(), "per_hour": machines.kind.per_hour},
        "fits": all(plan.fits for plan in plans),
        "stages": [_stage(plan) for plan in plans],
        "total": _total(plans),
    }


def _total(plans: "list[StagePlan]") -> dict[str, float]:
    return {
        "tokens": sum(plan.tokens for plan in plans),
        "hours": sum(plan.hours for plan in plans),
        "cost": sum(plan.cost for plan in plans),
        "storage_bytes": sum(plan.kept_bytes + plan.model_bytes for plan in plans),
    }


def _stage(plan: "StagePlan") -> dict[str, Any]:
    states, stage = plan.footprint.states, plan.setting.stage
    return {
        "stage": plan.stage,
        "parameters": plan.shape.parameters,
        "trainable_parameters": plan.shape.trainable,
        "steps": stage.steps,
        "micro_batch": stage.micro_batch,
        "accumulation": stage.accumulation,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "cost": plan.cost,
        "fits": plan.fits,
        "why_not": plan.why_not,
        "remedy": plan.remedy,
        "memory": {
            "peak": plan.footprint.peak,
            "weights": states.weights,
            "optimizer": states.optimizer,
            "gradients": states.gradients + states.step_gradients,
            "buffers": plan.footprint.buffers,
            "activations": plan.footprint.activations,
            "logits": plan.footprint.logits,
            "node_host": plan.host_bytes,
            "node_disk": plan.disk_bytes,
        },
        "memory_by_setting": plan.grid,
        "deepspeed_model_states": {name: {"gpu": g, "host": h} for name, (g, h) in plan.deepspeed.items()},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints_kept_bytes": plan.kept_bytes,
        "model_bytes": plan.model_bytes,
    }


def show(recipe: Recipe, plans: "list[StagePlan]", table: "HardwareSection", machines: "Machines") -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    usable = machines.usable_bytes(table)
    console.print(
        f"{recipe.name} on {machines.number} × {machines.name}: {_gib(usable)} GiB each for tensors; assumed: MFU "
        f"{table.mfu:g}; {machines.kind.per_hour:g} {table.prices.currency} an hour and {machines.name} "
        f"({table.prices.source}, {table.prices.as_of})",
        soft_wrap=True,
    )
    # Without lines, so that the columns have room on a terminal of 80.
    stages = Table(title="Stages; GiB saved and on each", box=None, pad_edge=False)
    stages.add_column("stage", no_wrap=True)
    money = table.prices.currency
    for heading in ("model", "learnt", "steps", "tokens", "hours", money, "saved", "each", "fits"):
        stages.add_column(heading, justify="right", no_wrap=True)
    for plan in plans:
        stages.add_row(
            plan.stage,
            _count(plan.shape.parameters),
            _count(plan.shape.trainable),
            str(plan.setting.stage.steps),
            _count(plan.tokens),
            f"{plan.hours:.3g}",
            f"{plan.cost:,.0f}",
            _gib(plan.checkpoint_bytes),
            _gib(plan.footprint.peak),
            "yes" if plan.fits else "no",
        )
    console.print(stages)
    ways = Table(title="GiB of one worker at its fullest (— does not fit)", box=None)
    ways.add_column("engine")
    for plan in plans:
        ways.add_column(plan.stage, justify="right")
    for way in plans[0].grid:
        sizes = [plan.grid[way] for plan in plans]
        ways.add_row(way, *(f"{_gib(size)}{' —' if size > usable else ''}" for size in sizes))
    console.print(ways)
    total = _total(plans)
    console.print(
        f"together {_count(total['tokens'])} tokens, {total['hours']:.3g} hours, {total['cost']:,.0f} "
        f"{table.prices.currency}, {_gib(total['storage_bytes'])} GiB of checkpoints and models"
    )
    for plan in plans:
        if not plan.fits:
            advice = f"would fit with {plan.remedy}" if plan.remedy else "no change of engine or number makes it fit"
            console.print(f"{plan.stage} cannot run: {plan.why_not}; {advice}", soft_wrap=True)


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.3g}"


def _count(number: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:g}"


if __name__ == "__main__":
    typer.run(main)
