"""Ray Train's trainer for a loop whose workers hold a DeepSpeed engine, by a recipe's `engine` section."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace


def deepspeed_trainer(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    recipe: "Recipe",
    workspace: "Workspace",
    run: str,
    *,
    workers: int | tuple[int, int],
    keep: int,
    **more: Any,
) -> "TorchTrainer":
    """config: what `worker` gets, beside `recipe` and `workspace`. run: the directory of the workspace for Ray Train's
    own records and checkpoints, of which it keeps `keep`. workers: their number, or a range. more: as `TorchTrainer`
    takes it."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    # What `ray.train.ScalingConfig` is, but for type checkers, which find the old one there.
    from ray.train.v2.api.config import ScalingConfig

    engine = recipe.engine
    on_gpus = engine.gpus_per_worker > 0
    parent, _, name = run.rpartition("/")
    return TorchTrainer(
        worker,
        train_loop_config={"recipe": recipe, "workspace": workspace, **config},
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=engine.collective_timeout_seconds),
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=engine.resize_seconds,
            use_gpu=on_gpus,
            resources_per_worker={"CPU": engine.cpus_per_worker} | ({"GPU": engine.gpus_per_worker} if on_gpus else {}),
            accelerator_type=(recipe.resources.accelerator or None) if on_gpus else None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=workspace.root(parent),
            storage_filesystem=workspace.fs,
            failure_config=ray.train.FailureConfig(max_failures=engine.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep),
        ),
        **more,
    )
