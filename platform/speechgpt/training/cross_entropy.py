"""Cross-entropy of next tokens without ever holding the logits of a whole batch."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from speechgpt.training.abilities import fuses_cross_entropy

CHUNK_LOGITS = 1 << 26
"""Logits that are held at once, 256 MiB of them in float32: 2033 targets of a vocabulary of 33,006. What fits is not
chunked, since making logits again costs time: on a CPU chunks of an eighth of this took the head half of the memory and
1.5 to 2 times as long."""


def token_losses(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, chunk_logits: int = CHUNK_LOGITS
) -> torch.Tensor:
    """Cross-entropy [nats] of each target, [targets], differentiable in `hidden` and the head.

    hidden: [targets, dimensions], what `head` makes logits of; targets: int64 [targets].

    Logits that do not fit `chunk_logits` are made a chunk at a time and again in the backward pass, so that the float32
    logits, their logarithm and their gradient, each targets × vocabulary, are never whole. The head is called as a
    module, as ZeRO-3 and LoRA need it. On GPUs with the package liger-kernel its fused kernel does the same without
    making anything twice.
    """
    if fuses_cross_entropy(head, hidden):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, head.weight, targets, head.bias, reduction="none")
    vocabulary = getattr(head, "out_features", 0) or 1
    size = max(1, chunk_logits // vocabulary)
    if len(targets) <= size:
        return _of_chunk(head, hidden, targets)
    if not torch.is_grad_enabled():
        chunks = [_of_chunk(head, *part) for part in zip(hidden.split(size), targets.split(size), strict=True)]
    else:
        chunks = [
            checkpoint(_of_chunk, head, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(hidden.split(size), targets.split(size), strict=True)
        ]
    return torch.cat(chunks)


def _of_chunk(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")
