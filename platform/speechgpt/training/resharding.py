"""A ZeRO checkpoint for another number of workers, by way of DeepSpeed's universal format."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from speechgpt.training.engine import import_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def convert(checkpoint: Path, tag: str, universal: Path) -> None:
    """Write the checkpoint `checkpoint/tag` of ZeRO 1, 2 or 3 in the universal format, as `universal/tag`."""
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    (universal / tag).mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(universal / tag),
        # More would fork this process, which has threads and perhaps a GPU.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # DeepSpeed writes what the converter wants only under tensor parallelism.
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(arguments)


def load(engine: "DeepSpeedEngine", universal: Path, tag: str) -> None:
    """Bring the engine, of any number of workers and the checkpoint's ZeRO stage, to `universal/tag`."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    with _universal(engine):
        engine.load_checkpoint(str(universal), tag=tag)
    # ZeRO-3 gives every group the settings of the first, and all parameters one step counter, which each then advances.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


@contextmanager
def _universal(engine: "DeepSpeedEngine") -> Iterator[None]:
    """DeepSpeed reads `checkpoint.load_universal` when it loads, but takes it only when an engine starts."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
