"""The training objective: weighted next-token cross-entropy over packed blocks."""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from speechgpt.training import row_attention
from speechgpt.training.blocks import Batch
from speechgpt.training.cross_entropy import token_losses


class Losses(NamedTuple):
    """Sums over one micro-batch; the last four are detached."""

    weighted: torch.Tensor
    text: torch.Tensor
    text_tokens: torch.Tensor
    units: torch.Tensor
    unit_tokens: torch.Tensor


class Objective(nn.Module):
    """A causal language model with its loss.

    Logits are computed only where a target has weight: most of a recognition row is units that nothing is learnt from.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, first_unit: int, unit_count: int) -> None:
        super().__init__()
        self.model: PreTrainedModel | PeftModel = model
        self.units = (first_unit, first_unit + unit_count)

    def forward(self, batch: Batch) -> Losses:
        """Sum of weight × cross-entropy [nats] over the batch, and the plain sums for text and unit targets."""
        # transformers isolates packed rows only if it sees position_ids but neither a mask nor a cache.
        causal: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        rows: dict[str, Any] = {}
        if causal.config._attn_implementation == row_attention.NAME:
            rows["row_lengths"] = row_attention.row_lengths(batch.positions)
        hidden = causal.get_decoder()(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **rows
        ).last_hidden_state
        weights = batch.weights[:, 1:]
        wanted = weights > 0
        targets = batch.ids[:, 1:][wanted]
        entropy = token_losses(causal.get_output_embeddings(), hidden[:, :-1][wanted], targets)
        plain = entropy.detach()
        is_unit = (targets >= self.units[0]) & (targets < self.units[1])
        return Losses(
            (entropy * weights[wanted]).sum(),
            plain[~is_unit].sum(),
            (~is_unit).sum(),
            plain[is_unit].sum(),
            is_unit.sum(),
        )
