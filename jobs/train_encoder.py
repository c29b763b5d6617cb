"""Make the encoder: take a shipped or published one, or train a HuBERT on Ray Train, by a teacher or by itself."""

import json
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jobs import encoder_training
from jobs.shell import Context, Job, command

_SHIPPED = "package:bundles/nano/encoder"


def run(context: Context) -> dict[str, Any]:
    init = context.recipe.encoder.init
    figures = encoder_training.train(context) if init == "scratch" else _adopt(context, init)
    files = ["config.json", "model.safetensors", "preprocessor_config.json", "unit_config.json"]
    return {"figures": figures, "outputs": [f"encoder/{name}" for name in files]}


def _adopt(context: Context, init: str) -> dict[str, Any]:
    """Copy the shipped encoder, or one in Hugging Face layout, into the workspace."""
    from transformers import AutoFeatureExtractor, HubertModel

    from speechgpt.speech import hubert

    layer = context.recipe.encoder.layer
    if init == "shipped":
        directory = Path(str(resources.files("speechgpt") / "bundles" / "nano" / "encoder"))
    else:
        directory = Path(init)
    model = HubertModel.from_pretrained(directory if directory.is_dir() else init)
    if (directory / hubert.UNIT_CONFIG).is_file() and layer == -1:
        layer = json.loads((directory / hubert.UNIT_CONFIG).read_text())["layer"]
    extractor = AutoFeatureExtractor.from_pretrained(directory if directory.is_dir() else init)
    features = hubert.HubertFeatures(model, layer, extractor.do_normalize)
    _write(context, lambda path: hubert.save(model, path, layer=features.layer, normalize=features.normalize))
    return {"parameters": sum(p.numel() for p in model.parameters()), "layer": features.layer}


def _write(context: Context, save: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            context.workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())


JOB = Job(
    name="train-encoder",
    part="encoder",
    run=run,
    reads=("manifest", "synthesize"),
    # All of the encoder but `long`, which training does not depend on.
    sections=(
        "encoder.init",
        "encoder.layer",
        "encoder.architecture",
        "encoder.batch_seconds",
        "encoder.training",
        "data",
    ),
    files=lambda recipe: [f"{_SHIPPED}/model.safetensors"] if recipe.encoder.init == "shipped" else [],
    partial=(encoder_training.PLACE, "checkpoints/encoder"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
