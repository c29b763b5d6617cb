"""A LoRA adapter as PEFT 0.3 wrote it (`adapter_model.bin`), in the layout that PEFT reads now."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch

from speechgpt.interop import weights
from speechgpt.interop.errors import ConversionError

CONFIG = "adapter_config.json"
# The last is what the Trainer's own checkpoints of such a run are called.
NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_FORGOTTEN = {"enable_lora": None, "merge_weights": False}
"""Settings of PEFT 0.2 that PEFT no longer has, and the values that mean nothing."""


def convert_adapter(source: str | Path, target: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the adapter in `source` to `target`, which must be empty or not there.

    dtype: of the weights written; None keeps what they have. Returns {"rank", "alpha", "modules", "parameters"}. Raises
    ConversionError naming the file and what does not fit.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    source, target = Path(source), Path(target)
    config = LoraConfig(**_settings(source))
    file, *_ = weights.find(source, NAMES)
    modules = _modules(file, weights.read(file), config.r, config.target_modules)
    with weights.appearing(target) as folder:
        written = {
            f"base_model.model.{module}.lora_{side}.weight": tensor.contiguous() if dtype is None else tensor.to(dtype)
            for module, sides in modules.items()
            for side, tensor in sides.items()
        }
        save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # PEFT keeps a set, whose order is another in each process.
        config.target_modules = sorted(config.target_modules or ())
        config.save_pretrained(str(folder))
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "modules": len(modules),
        "parameters": sum(tensor.numel() for tensor in written.values()),
    }


def _settings(source: Path) -> dict[str, Any]:
    from peft import LoraConfig

    file = source / CONFIG
    facts = weights.read_json(file)
    if facts.get("peft_type") != "LORA" or facts.get("task_type") != "CAUSAL_LM":
        raise ConversionError(
            f"{file}: a LORA adapter of a CAUSAL_LM is expected, not {facts.get('peft_type')!r} of "
            f"{facts.get('task_type')!r}"
        )
    for key, meaningless in _FORGOTTEN.items():
        if facts.pop(key, meaningless) not in (meaningless, None):
            raise ConversionError(f"{file}: {key} is set, which later versions of PEFT cannot do")
    if facts.get("bias", "none") != "none" or facts.get("modules_to_save"):
        raise ConversionError(f"{file}: bias or modules_to_save is set; only LoRA matrices are taken in")
    known = inspect.signature(LoraConfig).parameters
    if odd := [key for key in facts if key not in known]:
        raise ConversionError(f"{file}: unknown setting {odd[0]!r}")
    if not isinstance(facts.get("r"), int) or facts["r"] < 1 or not facts.get("target_modules"):
        raise ConversionError(f"{file}: r and target_modules are needed")
    # A list is a set of module names; a single string would be a pattern.
    if not isinstance(facts["target_modules"], list):
        raise ConversionError(f"{file}: target_modules must be a list of module names")
    return facts


def _modules(
    file: Path, tensors: dict[str, torch.Tensor], rank: int, targets: Any
) -> dict[str, dict[str, torch.Tensor]]:
    """{module of the base model: {"A": [rank, in], "B": [out, rank]}}."""
    if not tensors:
        raise ConversionError(
            f"{file}: holds no tensor at all; some versions of the training scripts filter the adapter's weights twice "
            "and save nothing. Take the adapter from a checkpoint's pytorch_model.bin instead"
        )
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ConversionError(f"{file}: {name} is not a LoRA matrix")
        module, side = match["module"], match["side"]
        if module.rpartition(".")[2] not in targets:
            raise ConversionError(f"{file}: {name}, but {CONFIG} targets only {', '.join(sorted(targets))}")
        if tensor.dim() != 2 or tensor.shape[0 if side == "A" else 1] != rank:
            raise ConversionError(f"{file}: {name} is {list(tensor.shape)}, but {CONFIG} says r = {rank}")
        modules.setdefault(module, {})[side] = tensor
    for module, sides in modules.items():
        if missing := {"A", "B"} - set(sides):
            raise ConversionError(f"{file}: {module} has no lora_{missing.pop()}")
    parents = {module.rpartition(".")[0] for module in modules}
    for target in sorted(targets):
        beside = {module.rpartition(".")[0] for module in modules if module.rpartition(".")[2] == target}
        if not beside:
            raise ConversionError(f"{file}: no matrix for {target}, which {CONFIG} targets")
        # Only modules that sit in the same block can be compared: attention with attention.
        siblings = {parent for parent in parents if parent.rpartition(".")[2] == next(iter(beside)).rpartition(".")[2]}
        if absent := sorted(siblings - beside):
            raise ConversionError(f"{file}: no matrix for {absent[0]}.{target}; the file is not complete")
    return dict(sorted(modules.items()))
