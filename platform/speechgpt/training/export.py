"""A trained engine as files that others read: Hugging Face safetensors, or a PEFT adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model_state_dict

from speechgpt.training.engine import import_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def export(engine: "DeepSpeedEngine", directory: Path | None) -> None:
    """Write the model under an engine (its module is an Objective), or only the adapter if it has one.

    Every rank calls it, because under ZeRO-3 the weights are gathered; only the rank with a `directory` writes.
    """
    model = engine.module.model
    weights = _adapter_weights(model) if isinstance(model, PeftModel) else _whole_weights(engine)
    if directory is None:
        return
    if isinstance(model, PeftModel):
        for section in model.peft_config.values():
            # PEFT keeps a set, whose order is another in each process; the same training must give the same bytes.
            section.target_modules = sorted(section.target_modules)  # type: ignore[attr-defined]
    model.save_pretrained(directory, state_dict=weights)
    # PEFT's empty model card, which names the place that the base model was read from.
    (directory / "README.md").unlink(missing_ok=True)


def _whole_weights(engine: "DeepSpeedEngine") -> dict[str, torch.Tensor]:
    if engine.zero_optimization_stage() < 3:
        return engine.module.model.state_dict()
    # Gathered in the training precision, on rank 0 alone; elsewhere there is nothing.
    gathered = engine._zero3_consolidated_16bit_state_dict() or {}
    return {name.removeprefix("model."): tensor for name, tensor in gathered.items()}


def _adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    partitioned = any(hasattr(parameter, "ds_id") for parameter in trained)
    with import_deepspeed().zero.GatheredParameters(trained, enabled=partitioned):
        state = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        return get_peft_model_state_dict(model, state_dict=state)
