"""Causal attention over packed blocks that computes nothing between rows.

transformers' sdpa masks a block as a whole, so that many short rows cost as much as a long one; row by row, the cost is
that of the rows alone.
"""

from typing import Any, NewType

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_rows"
RowLengths = NewType("RowLengths", list[list[int]])
"""Of each block in a batch, from left to right; they add up to the block."""


def fits(config: PreTrainedConfig) -> bool:
    """Whether every layer attends to all that stands before, as opposed to a window or a state."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None


def implementation(config: PreTrainedConfig) -> str:
    """The attention to load a model with for training. On GPUs a launch a row is not yet known to be worth it."""
    return NAME if fits(config) and not torch.cuda.is_available() else "sdpa"


def row_lengths(positions: torch.Tensor) -> RowLengths:
    """positions: [blocks, block], from 0 in each row, and 0 throughout the padding.

    Rows of one token that follow each other, as padding is, count as one row: nothing is predicted from them.
    """
    starts = (positions == 0).cpu()
    of_one_token = starts & F.pad(starts[:, 1:], (0, 1), value=True)
    follows_another = F.pad(starts[:, :-1], (1, 0), value=False)
    borders = [row.nonzero().flatten().tolist() for row in starts & ~(of_one_token & follows_another)]
    block = positions.shape[1]
    return RowLengths([[end - start for start, end in zip(row, [*row[1:], block], strict=True)] for row in borders])


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_lengths: RowLengths | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [blocks, heads, block, head size]; without row_lengths as sdpa itself."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    blocks = []
    for number, lengths in enumerate(row_lengths):
        rows = zip(*(one[number : number + 1].split(lengths, dim=2) for one in (query, key, value)), strict=True)
        attended = [sdpa_attention_forward(module, q, k, v, None, dropout, scaling, **others)[0] for q, k, v in rows]
        blocks.append(torch.cat(attended, dim=1))
    return torch.cat(blocks), None


AttentionInterface.register(NAME, _attention)
# The mask is for generation beside training; where rows are given nobody looks at it.
AttentionMaskInterface.register(NAME, sdpa_mask)
