"""DeepSpeed: its configuration from the recipe, and a model under ZeRO."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from speechgpt.training import abilities
from speechgpt.training.config import EngineSection, StageSection

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

BETAS = (0.9, 0.98)
"""AdamW's, as nano was tuned with: short stages want a second moment that forgets within fifty steps."""


def configuration(engine: EngineSection, stage: StageSection, workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one stage on `workers` ranks."""
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": engine.gpus_per_worker > 0}
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if engine.offload != "none":
        place: dict[str, Any] = {"device": engine.offload, "pin_memory": engine.gpus_per_worker > 0}
        if engine.offload == "nvme":
            place["nvme_path"] = engine.nvme_path
        zero["offload_optimizer"] = place
        if engine.zero_stage == 3:
            zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.accumulation,
        "train_batch_size": stage.micro_batch * stage.accumulation * workers,
        "gradient_clipping": stage.clip,
        "zero_optimization": zero,
        # torch's own AdamW runs everywhere; DeepSpeed's is compiled on each new machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        # The loop prints its own progress.
        "steps_per_print": sys.maxsize,
    }


@contextmanager
def partitioned_loading(configuration: dict[str, Any]) -> Iterator[None]:
    """Within it, `from_pretrained` gives each rank only its part of the weights, if the configuration is ZeRO-3."""
    if configuration["zero_optimization"]["stage"] < 3:
        yield
        return
    import_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    # transformers holds only a weak reference: the object must live while the model loads.
    alive = HfDeepSpeedConfig(configuration)
    yield
    del alive


def import_deepspeed() -> Any:
    """The `deepspeed` module, imported without what it takes only because it is installed.

    Fairseq: DeepSpeed survives only ImportError, which is not what fairseq 0.12 raises on Python 3.11. MLflow, for its
    autotuning: it would be nearly all of the time that the import takes.
    """
    absent = [name for name in ("fairseq", "mlflow") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        import deepspeed
    finally:
        for name in absent:
            del sys.modules[name]
    return deepspeed


def join(engine: EngineSection) -> None:
    """Put this process into DeepSpeed's process group: the one that exists or that a launcher's environment (RANK,
    WORLD_SIZE, MASTER_ADDR…) describes, else one of its own alone.

    Raises AbilityError where this machine lacks what the section asks of it.
    """
    deepspeed = import_deepspeed()
    if engine.offload == "nvme":
        abilities.require_asynchronous_io()
    gpu = engine.gpus_per_worker > 0
    patience = timedelta(seconds=engine.collective_timeout_seconds)
    if not distributed.is_initialized() and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        distributed.init_process_group("nccl" if gpu else "gloo", store=distributed.HashStore(), rank=0, world_size=1)
    if not gpu:
        # Only DeepSpeed's inference uses this operator, and compiling it takes most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", timeout=patience, verbose=False)


def under_zero(
    model: nn.Module, engine: EngineSection, stage: StageSection, configuration: dict[str, Any]
) -> "DeepSpeedEngine":
    """The model as a DeepSpeed engine with AdamW over its trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if _dimensions(parameter) >= 2]
    vectors = [parameter for parameter in trainable if _dimensions(parameter) < 2]
    groups = [{"params": matrices, "weight_decay": stage.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=BETAS, fused=True)
    started, *_ = import_deepspeed().initialize(
        model=model, optimizer=optimizer, model_parameters=trainable, config=configuration
    )
    _lose_patience_after(timedelta(seconds=engine.collective_timeout_seconds))
    return started


def _lose_patience_after(patience: timedelta) -> None:
    """Let collectives of every process group fail after so long; DeepSpeed makes groups of its own, with torch's 10 or
    30 minutes."""
    for group in distributed.distributed_c10d._world.pg_map:
        if group.size() > 1:
            distributed.distributed_c10d._set_pg_timeout(patience, group)


def set_rate(engine: "DeepSpeedEngine", rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; one without is many times faster in float32."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def parameter_count(model: nn.Module, trainable: bool = False) -> int:
    """Parameters of the whole model, those on other ranks included."""
    return sum(element_count(p) for p in model.parameters() if p.requires_grad or not trainable)


def element_count(parameter: torch.Tensor) -> int:
    """Of the whole parameter, of which a rank holds only a piece under ZeRO-3."""
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))


def _dimensions(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a rank holds a flat piece; `ds_shape` is the whole parameter's shape.
    return len(getattr(parameter, "ds_shape", parameter.shape))
