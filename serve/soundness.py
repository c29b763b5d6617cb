"""What the files of a bundle must stand before a running service is sent to it."""

from pathlib import Path


def broken_tensor(bundle: Path) -> str | None:
    """The first tensor with a NaN or an infinity in it, as `file: tensor`. The hashes of such a bundle may well hold:
    a training that went wrong wrote it."""
    import torch
    from safetensors import safe_open

    for file in sorted(bundle.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    return f"{file.relative_to(bundle)}: {name}"
    return None
