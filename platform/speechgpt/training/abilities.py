"""What a recipe may ask for and only some machines have: said before training, with what to do about it."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class AbilityError(RuntimeError):
    """This machine lacks what the recipe asks for; the message names the key and the remedy."""


def require_asynchronous_io() -> None:
    """Raise AbilityError unless DeepSpeed's `aio` operator, with which ZeRO-3 offloads to NVMe, can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise AbilityError(
            "engine.offload: nvme needs DeepSpeed's operator aio, which cannot be built here: install libaio-dev and a "
            "C++ compiler on every node, or set engine.offload to cpu"
        )


def require_int8() -> None:
    """Raise AbilityError unless bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        raise AbilityError(
            "lora.base: int8 needs the package bitsandbytes on every worker: pip install 'speechgpt-ray[int8]', or set "
            "lora.base to full"
        )


def fuses_cross_entropy(head: "nn.Module", hidden: "torch.Tensor") -> bool:
    """Whether Liger's kernel can make the losses of these states: on a GPU, from a plain head that lies there whole."""
    from torch import nn

    return (
        hidden.is_cuda
        # A LoRA layer has more than a weight, and under ZeRO-3 a rank holds a piece of it.
        and type(head) is nn.Linear
        and not hasattr(head.weight, "ds_id")
        and find_spec("liger_kernel") is not None
    )
