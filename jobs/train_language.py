"""Train one stage of the language model: Ray Data tokenises and packs its rows, Ray Train runs DeepSpeed over them."""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jobs.shell import Context, Job, JobError, command
from speechgpt.training.config import StageName

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    import ray.train

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace
    from speechgpt.training.unit_noise import UnitNoise

_ROWS = "instructions/rows.parquet"
_ROWS_PER_TASK = 4096
_BLOCKS_PER_TASK = 64
"""Tasks are cut from the rows and the plan, never from what the cluster offers, so that a rerun forms the same ones."""


def run(context: Context) -> dict[str, Any]:
    import ray.data
    import ray.train

    from jobs import ray_data, stage_checkpoints, stage_validation
    from jobs.deepspeed_trainer import deepspeed_trainer
    from jobs.preemption import detect_hangs
    from jobs.spoken_samples import SpokenSamples
    from jobs.stage_failure import fitted
    from jobs.training_curves import training_curves
    from speechgpt.training.engine import multiplies_bf16

    name, recipe, workspace = _stage_name(context), context.recipe, context.workspace
    stage, engine = recipe.stages[name], recipe.engine
    ray_data.connect(recipe.resources)
    start = _starting_model(context)
    blocks, digest, figures = _blocks(context, start)
    checkpoints = f"checkpoints/{name}/run"
    stage_checkpoints.tidy(workspace, checkpoints, stage.keep, context.progress.say)
    detect_hangs(engine.collective_timeout_seconds, gpus=engine.gpus_per_worker > 0)
    if engine.precision == "bf16" and not engine.gpus_per_worker and not multiplies_bf16():
        context.progress.say("engine.precision: this CPU has no bfloat16 instructions; fp32 is many times faster on it")
    held_out = stage_validation.held_out(context, name, start)
    with training_curves(context, name, stage.steps, SpokenSamples(context).log) as curves:
        trainer = deepspeed_trainer(
            _train,
            {"stage": name, "start": start, "blocks": digest, "curves": curves, "held_out": held_out},
            recipe,
            workspace,
            checkpoints,
            workers=engine.workers,
            keep=stage.keep,
            datasets={"blocks": blocks},
            # Every node reads the whole stage and picks its blocks by index.
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        )
        result = fitted(trainer, f"stages.{name}")
    stage_checkpoints.tidy(workspace, checkpoints, stage.keep, context.progress.say)
    figures = {**(result.metrics or {}), **figures, **workspace.read_json(f"checkpoints/{name}/figures.json")}
    figures |= stage_validation.summary(workspace, name) | stage_validation.register(context, name)
    return {"figures": figures, "outputs": [f"models/{name}"]}


def _stage_name(context: Context) -> StageName:
    for name in context.recipe.stages:
        if name == context.argument:
            return name
    raise JobError(
        f"recipe {context.recipe.name} has no stage {context.argument!r}; it has {list(context.recipe.stages)}"
    )


def _starting_model(context: Context) -> str:
    """Where the stage's starting model lies in the workspace; the first stage's is made here."""
    from safetensors.torch import load

    from speechgpt.runtime.workspace import Workspace
    from speechgpt.training import starting

    name, recipe, workspace = _stage_name(context), context.recipe, context.workspace
    if previous := recipe.stages[name].start_from:
        if workspace.exists(f"models/{previous}/adapter_config.json"):
            raise JobError(
                f"stages.{name}.start_from: {previous!r} is trained by LoRA and leaves an adapter, not a model; "
                f"start from the stage before it, or train {previous!r} without lora"
            )
        return f"models/{previous}"
    start = f"checkpoints/{name}/start"
    if not workspace.exists(start):
        context.progress.say(f"{name}: making the starting model from {recipe.language.base}")
        centroids = load(workspace.read_bytes("encoder/kmeans.safetensors"))["centroids"]
        rows = sorted(row for row in workspace.read_table(_ROWS)["plain_text"].to_pylist())
        with ExitStack() as opened:
            base = recipe.language.base
            if base == "shipped":
                _copy_shipped(workspace, opened.enter_context(workspace.stage(start)), recipe)
                return start
            if base.startswith("s3://"):
                base = str(opened.enter_context(Workspace(base).fetch("")))
            directory = opened.enter_context(workspace.stage(start))
            starting.write_base(
                directory, recipe.language, None if base == "scratch" else base, rows, centroids, recipe.seed
            )
    return start


def _copy_shipped(workspace: "Workspace", directory: Path, recipe: "Recipe") -> None:
    """The shipped nano's language model, to be trained on; where the workspace has other units than its own, they are
    new words in it. Raises JobError for another number of units."""
    from safetensors.torch import load

    from speechgpt.training.starting import write_base_with_new_units

    codebook = "encoder/kmeans.safetensors"
    with resources.as_file(resources.files("speechgpt") / "bundles" / "nano") as bundle:
        if (bundle / codebook).read_bytes() == workspace.read_bytes(codebook):
            shutil.copytree(bundle / "language", directory, dirs_exist_ok=True)
            return
        centroids = load(workspace.read_bytes(codebook))["centroids"]
        try:
            write_base_with_new_units(directory, recipe.language, bundle / "language", centroids, recipe.seed)
        except ValueError as error:
            raise JobError(f"{error}; set codebook.clusters to as many, or codebook.init to shipped") from None


def _blocks(context: Context, start: str) -> tuple["ray.data.Dataset", str, dict[str, float]]:
    """The stage's packed blocks, a digest of them, and figures about the rows they are made of."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray
    import ray.data

    from jobs import held_out
    from speechgpt.training import mixture, packing
    from speechgpt.training.elastic import blocks_a_step

    name, recipe, workspace = _stage_name(context), context.recipe, context.workspace
    stage = recipe.stages[name]
    rows, _ = held_out.divided(workspace.read_table(_ROWS), stage)
    kinds = [kind for kind, weight in stage.mixture.items() if weight > 0]
    rows = rows.filter(pc.is_in(rows["kind"], pa.array(kinds))).sort_by("id")
    tasks = [rows.slice(first, _ROWS_PER_TASK) for first in range(0, max(len(rows), 1), _ROWS_PER_TASK)]
    tokenise: Callable[..., pa.Table] = _tokenise
    arguments = {"workspace": workspace, "start": start, "loss_on": stage.loss_on, "unit_weight": stage.unit_weight}
    tokenised = ray.data.from_arrow(tasks).map_batches(
        tokenise, fn_kwargs=arguments, batch_format="pyarrow", batch_size=None
    )
    table = pa.concat_tables(ray.get(tokenised.to_arrow_refs())).sort_by("id").combine_chunks()
    lengths = pc.list_value_length(table["ids"]).to_numpy()
    longest, limit = _longest_row(workspace, start, name, stage.block)
    table = table.filter(pa.array(lengths <= longest))
    left_out = int((lengths > longest).sum())
    if left_out:
        context.progress.say(
            f"{name}: {left_out} of {len(lengths)} rows are longer than {longest} tokens and are left out (the longest "
            f"has {lengths.max()}): raise {limit} to take them in"
        )
    lengths = lengths[lengths <= longest]
    try:
        draws = mixture.draw(table["kind"].to_pylist(), table["category"].to_pylist(), stage.mixture, recipe.seed)
        planned = packing.plan(draws, lengths.tolist(), stage.block)
        count = stage.steps * blocks_a_step(stage, recipe.engine)
        plan = [next(planned) for _ in range(count)]
    except ValueError as error:
        raise JobError(f"stages.{name}: {error}; rows come from the job `instructions`") from None
    tokens = table.select(["ids", "weights"])
    groups = [
        pa.table({"index": pa.array(range(first, first + len(part)), pa.int64()), "rows": part})
        for first in range(0, count, _BLOCKS_PER_TASK)
        if (part := plan[first : first + _BLOCKS_PER_TASK])
    ]
    with workspace.fetch(start) as directory:
        from speechgpt.language.vocabulary import Vocabulary

        vocabulary = Vocabulary.load(directory)
    how = {
        "tokens": ray.put(tokens),
        "block": stage.block,
        "pad": vocabulary.pad,
        "noise": _noise(workspace, stage.unit_noise, vocabulary.first_unit),
        "seed": recipe.seed,
    }
    pack: Callable[..., pa.Table] = _pack
    # Whole before training begins: the workers will hold the CPUs that packing needs.
    blocks = (
        ray.data.from_arrow(groups)
        .map_batches(pack, fn_kwargs=how, batch_format="pyarrow", batch_size=None)
        .materialize()
    )
    flat = np.concatenate([np.array(part) for part in plan])
    digest = hashlib.sha256()
    digest.update(repr((stage.block, vocabulary.pad, stage.unit_noise, [len(part) for part in plan])).encode())
    digest.update(flat.tobytes())
    for column in ("ids", "weights"):
        digest.update(tokens[column].combine_chunks().flatten().to_numpy())
    packed = int(lengths[flat].sum())
    figures = {
        "rows": float(len(lengths)),
        "rows_left_out": float(left_out),
        "rows_drawn": float(len(flat)),
        "tokens": float(packed),
        "block_fill": packed / (count * stage.block),
    }
    return blocks, digest.hexdigest(), figures


def _longest_row(workspace: "Workspace", start: str, name: str, block: int) -> tuple[int, str]:
    """Tokens of the longest row that is taken, and the recipe's key that says so.

    A block may be longer than the model's context, a row may not: it would teach positions that nobody serves.
    """
    context = workspace.read_json(f"{start}/config.json").get("max_position_embeddings") or block
    if context < block:
        return context, "language.architecture.max_position_embeddings"
    return block, f"stages.{name}.block"


def _tokenise(rows: "pa.Table", workspace: "Workspace", start: str, loss_on: Any, unit_weight: float) -> "pa.Table":
    import pyarrow as pa

    from speechgpt.language.vocabulary import Vocabulary
    from speechgpt.training.targets import encode

    with workspace.fetch(start) as directory:
        vocabulary = Vocabulary.load(directory)
    encoded = [
        encode(vocabulary, row["prefix"], row["plain_text"], loss_on, unit_weight)
        for row in rows.select(["prefix", "plain_text"]).to_pylist()
    ]
    return (
        rows.select(["id", "kind", "category"])
        .append_column("ids", pa.array([ids for ids, _ in encoded], pa.list_(pa.int32())))
        .append_column("weights", pa.array([weights for _, weights in encoded], pa.list_(pa.float32())))
    )


def _noise(workspace: "Workspace", share: float, first_unit: int) -> "UnitNoise | None":
    if not share:
        return None
    from safetensors.numpy import load

    from speechgpt.training.unit_noise import UnitNoise

    return UnitNoise(load(workspace.read_bytes("encoder/kmeans.safetensors"))["centroids"], first_unit, share)


def _pack(plan: "pa.Table", tokens: Any, block: int, pad: int, noise: "UnitNoise | None", seed: int) -> "pa.Table":
    import numpy as np
    import ray

    from speechgpt.training.blocks import table
    from speechgpt.training.packing import pack

    rows: pa.Table = ray.get(tokens)

    def row(number: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = (rows[column][number].values.to_numpy() for column in ("ids", "weights"))
        return (noise(ids, weights, draw) if noise else ids), weights

    packed = []
    for index, part in zip(plan["index"].to_pylist(), plan["rows"].to_pylist(), strict=True):
        draw = np.random.default_rng((seed, index))
        packed.append(pack([row(number, draw) for number in part], block, pad))
    return table(plan["index"].to_pylist(), packed)


def _train(config: dict[str, Any]) -> None:
    """One worker of a stage."""
    import ray.train
    import torch
    from torch import distributed

    from jobs.preemption import Departures
    from jobs.stage_checkpoints import StageCheckpoints, Uploads
    from jobs.stage_validation import StageWatch
    from speechgpt.training import elastic, node_local, starting
    from speechgpt.training import engine as zero
    from speechgpt.training.blocks import Blocks
    from speechgpt.training.export import export
    from speechgpt.training.loop import train
    from speechgpt.training.objective import Objective

    recipe: Recipe = config["recipe"]
    workspace: Workspace = config["workspace"]
    section = recipe.engine
    where = ray.train.get_context()
    rank = where.get_world_rank()
    stage = elastic.for_workers(recipe.stages[config["stage"]], section, where.get_world_size())
    zero.join(section)
    # A worker that is started again finds them there.
    path = node_local.directory() / f"{config['blocks'][:32]}.arrow"
    node_local.made_once(path, lambda partial: _stream(partial, stage.block))
    distributed.barrier()
    torch.manual_seed(recipe.seed)
    settings = zero.configuration(section, stage, where.get_world_size())
    with workspace.fetch(config["start"]) as start:
        vocabulary, prompts = starting.interface(start)
        with zero.partitioned_loading(settings):
            int8 = stage.lora is not None and stage.lora.base == "int8"
            model: Any = starting.load(start, section.gradient_checkpointing, int8)
        if stage.lora:
            model = starting.add_lora(model, stage.lora, stage.start_from, recipe.seed)
    objective = Objective(model, vocabulary.first_unit, vocabulary.unit_count)
    engine = zero.under_zero(objective, section, stage, settings)
    last: dict[str, float] = {
        "parameters": zero.parameter_count(model),
        "trainable_parameters": zero.parameter_count(model, trainable=True),
    }

    blocks, uploads = Blocks(path), Uploads()
    watch = StageWatch(config, stage, engine, blocks, vocabulary, prompts)

    def report(figures: dict[str, float], directory: Path | None) -> None:
        figures = watch.gauges.read(figures)
        last.update(figures)
        if directory is not None:
            uploads.report(dict(last), directory)
        elif rank == 0:
            # Straight to the driver: ray.train.report waits for every worker and for the controller's next look.
            config["curves"].send(figures)

    store = StageCheckpoints(workspace, f"checkpoints/{config['stage']}/run")
    blocks_read = train(engine, blocks, stage, report, store, recipe.seed, Departures(), watch.validation)
    with ExitStack() as opened:
        directory = opened.enter_context(workspace.stage(f"models/{config['stage']}")) if rank == 0 else None
        if not watch.take_best(directory):
            export(engine, directory)
            if directory is not None and not stage.lora:
                vocabulary.save(directory)
                prompts.save(directory)
    if rank == 0:
        # An attempt that finds the last step done reports nothing to Ray Train, which then has no figures.
        steps = blocks_read // elastic.blocks_a_step(recipe.stages[config["stage"]], section)
        closing = {**last, "step": steps, "blocks_read": blocks_read}
        workspace.write_json(f"checkpoints/{config['stage']}/figures.json", closing)
    distributed.barrier()
    node_local.forget(path)


def _stream(path: Path, block: int) -> None:
    import ray.train

    from speechgpt.training import blocks

    shard = ray.train.get_dataset_shard("blocks")
    blocks.write(path, shard.iter_batches(batch_size=_BLOCKS_PER_TASK, batch_format="pyarrow"), block)


def _reads(recipe: "Recipe", name: str | None) -> tuple[str, ...]:
    """The rows, and the model that the stage starts from (for the first stage the codebook)."""
    stage = next((section for key, section in recipe.stages.items() if key == name), None)
    return ("instructions", f"train-{stage.start_from}" if stage and stage.start_from else "fit-units")


JOB = Job(
    name="train",
    part="models",
    run=run,
    reads=_reads,
    sections=("stages.{argument}", "engine", "language"),
    variants=get_args(StageName),
    partial=("checkpoints/{argument}",),
)
main = command(JOB)

if __name__ == "__main__":
    main()
