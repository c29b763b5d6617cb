"""How much memory a worker of a stage needs at its fullest moment, by what DeepSpeed keeps and when."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from speechgpt.training.config import EngineSection, StageSection
from speechgpt.training.cross_entropy import CHUNK_LOGITS
from speechgpt.training.shape import Kept, Shape

BUCKET = 500_000_000
"""Elements: DeepSpeed's `reduce_bucket_size` and `allgather_bucket_size`."""
PREFETCH = 50_000_000
"""Elements: `stage3_prefetch_bucket_size`."""
LIVE = 1_000_000_000
"""Elements: `stage3_max_live_parameters`, gathered weights that are kept for their next use."""

SUB_GROUP = 1_000_000_000
"""Elements: `sub_group_size`, of which ZeRO-3 steps on one after the other."""
SWAPPED_WEIGHTS = 5 * 100_000_000
"""Elements: `buffer_count` and `buffer_size` of `offload_param`, through which weights go between NVMe and GPU."""
WEIGHTS_ON_HOST = 1_000_000_000
"""Elements: `max_in_cpu` of `offload_param`, weights that stay on the host."""
SWAPPED_STATES = 4
"""`buffer_count` of `offload_optimizer`: float32 copies of a sub-group, in which states pass to the step and back."""

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype(engine: EngineSection) -> torch.dtype:
    """Of weights, gradients and activations; optimiser states are float32 under ZeRO."""
    return _PRECISIONS[engine.precision]


class States(NamedTuple):
    """Bytes that one worker holds of the model and its optimiser, on its device, its host and its node's disk."""

    weights: int
    optimizer: int
    """Adam's two moments, and the float32 copy of the weights that ZeRO steps on (in fp32 training, too)."""
    gradients: int
    """As they stand after the backward pass."""
    step_gradients: int
    """The flat copy that the optimiser is handed."""
    host: int = 0
    disk: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.step_gradients


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker at its fullest. The device is the GPU, or the process on a machine without."""

    states: States
    buffers: int
    """Buckets that gradients are reduced in."""
    activations: int
    logits: int
    """Of the head, with the loss and its gradient in float32, as if every token were a target; at most a chunk
    (`cross_entropy.CHUNK_LOGITS`; a GPU with the package liger-kernel needs less)."""
    gathered: int
    """Weights of other ranks, under ZeRO-3."""
    accumulating: bool
    on_gpu: bool

    @property
    def peak(self) -> int:
        """The largest of: activations beside what is held already, gradients being reduced, the optimiser's step.

        A GPU's buckets are there from the first backward pass to its end. On a host the allocator keeps what
        activations took when they are gone, the buckets are touched as gradients come, and a checkpoint is written from
        a copy of the weights.
        """
        states = self.states
        worked = self.activations + self.logits
        accumulated = states.gradients if self.accumulating else 0
        if self.on_gpu:
            backward = max(worked + accumulated, states.gradients) + self.buffers + self.gathered
            return states.weights + states.optimizer + max(backward, states.gradients + states.step_gradients)
        reduction = states.gradients + self.buffers + self.gathered
        step = states.gradients + states.step_gradients
        return states.weights + states.optimizer + worked + max(reduction, step, states.weights)


def states(shape: Shape, engine: EngineSection, workers: int) -> States:
    """ZeRO's partition of weights, gradients and optimiser states over `workers`.

    `shape.eight_bit` weights take a byte each. In 16-bit training the sum is what DeepSpeed's own estimator gives for
    ZeRO-2 (2P + 18P/N); for ZeRO-3 it differs from its 18P/N by what gradients take in 16 bits, at most 2P/N.
    """
    size = dtype(engine).itemsize
    part, learnt, zero = workers, shape.trainable, engine.zero_stage
    if zero == 0:
        # torch's own AdamW on the model's parameters, without a copy.
        return States(_weights(shape, size), 2 * size * learnt, size * learnt, 0)
    weights = _weights(shape, size) // (part if zero == 3 else 1)
    gradients = size * learnt // (part if zero >= 2 else 1)
    optimizer, step = 12 * learnt // part, 4 * learnt // part
    if zero == 3:
        # Group by group.
        step = min(step, 4 * SUB_GROUP)
    if engine.offload == "none":
        return States(weights, optimizer, gradients, step)
    if engine.offload == "nvme":
        swapped = size * (SWAPPED_WEIGHTS + min(WEIGHTS_ON_HOST, shape.parameters // part))
        swapped += 4 * SWAPPED_STATES * min(SUB_GROUP, learnt // part)
        # Gradients in float32 beside what is stepped on.
        return States(0, 0, 0, 0, gradients + swapped, optimizer + 4 * learnt // part + weights)
    host = optimizer + step + gradients + (weights if zero == 3 else 0)
    return States(0 if zero == 3 else weights, 0, 0, 0, host)


def _weights(shape: Shape, size: int) -> int:
    return size * (shape.parameters - shape.eight_bit) + shape.eight_bit


def footprint(shape: Shape, kept: Kept, engine: EngineSection, stage: StageSection, workers: int) -> Footprint:
    """kept: of `stage.micro_batch` blocks of `stage.block` tokens in the engine's precision."""
    precision = dtype(engine)
    tokens = stage.micro_batch * stage.block
    # Of every logit that is held at once: its probability and two gradients in float32, and below that precision its
    # own gradient.
    each = 12 if precision is torch.float32 else 12 + precision.itemsize
    return Footprint(
        states=states(shape, engine, workers),
        buffers=_buffers(shape, engine),
        activations=kept.total(shape.layers, engine.gradient_checkpointing),
        logits=min(tokens * shape.rows, CHUNK_LOGITS) * each,
        gathered=_gathered(shape, engine),
        accumulating=stage.accumulation > 1,
        on_gpu=engine.gpus_per_worker > 0,
    )


def _buffers(shape: Shape, engine: EngineSection) -> int:
    size, gpu = dtype(engine).itemsize, engine.gpus_per_worker > 0
    if not gpu or engine.zero_stage == 0:
        # Of a host's bucket only what is touched is there. ZeRO fills one and reduces a flat copy; without it there is
        # but the copy.
        return size * min(BUCKET, shape.trainable) * (2 if engine.zero_stage else 1)
    # Whole, and twice: one is filled while the other is sent, of which a flat copy is made.
    return size * BUCKET * 3


def _gathered(shape: Shape, engine: EngineSection) -> int:
    if engine.zero_stage < 3:
        return 0
    return dtype(engine).itemsize * (min(LIVE, shape.parameters) + min(PREFETCH, shape.parameters))


def checkpoint_bytes(shape: Shape, engine: EngineSection) -> int:
    """A checkpoint of all ranks together: the weights, and what ZeRO steps on."""
    size = dtype(engine).itemsize
    if engine.zero_stage == 0:
        return _weights(shape, size) + 2 * size * shape.trainable
    return _weights(shape, size) + 12 * shape.trainable


def model_bytes(shape: Shape, engine: EngineSection, stage: StageSection) -> int:
    """What the stage leaves in models/: an adapter, or the whole model in the precision it was trained in."""
    return dtype(engine).itemsize * (shape.trainable if stage.lora else shape.parameters)


class EstimatorError(ValueError):
    """DeepSpeed's estimators do not cover it."""


def deepspeed_states(shape: Shape, engine: EngineSection, gpus_per_node: int, nodes: int) -> tuple[int, int]:
    """(bytes of a GPU, bytes of a node's host) for the model states by DeepSpeed's own estimators.

    They know 16-bit training of all weights under ZeRO-2 and -3; EstimatorError for anything else.
    """
    from speechgpt.training.engine import import_deepspeed

    if dtype(engine).itemsize != 2 or engine.zero_stage < 2 or shape.trainable != shape.parameters:
        raise EstimatorError("DeepSpeed estimates 16-bit training of all weights under ZeRO-2 and ZeRO-3 only")
    import_deepspeed()
    offloaded = engine.offload != "none"
    if engine.zero_stage == 2:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        host, device = estimate_zero2_model_states_mem_needs(shape.parameters, gpus_per_node, nodes, offloaded)
        return device, host
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    host, device, _ = estimate_zero3_model_states_mem_needs(
        shape.parameters, shape.largest_layer, gpus_per_node, nodes, offloaded, offloaded
    )
    return device, host
