"""A published SpeechGPT language model, or the LLaMA it grew from, in our `language/` layout.

In, as transformers 4.33 wrote it: `config.json`, `pytorch_model.bin` (or shards with their index), `tokenizer.model`,
`added_tokens.json`. Out: safetensors, `tokenizer.json`, `unit_vocabulary.json`, `prompt_format.json` (SPEC 2.3, 2.7).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speechgpt.interop import weights
from speechgpt.interop.errors import ConversionError
from speechgpt.language import sentencepiece_bpe
from speechgpt.language.prompts import PromptFormat
from speechgpt.language.segments import RELEASED_MARKERS
from speechgpt.language.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

NAMES = ("model.safetensors", "pytorch_model.bin")
_VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_PADDING = 128
"""Some trainings round the embedding up; a height that is farther off is another vocabulary's."""


def convert_language(
    source: str | Path, target: str | Path, dtype: torch.dtype | None = None, seed: int = 1
) -> dict[str, Any]:
    """Write `source` in our layout to `target`, which must be empty or not there, and appears whole or not at all.

    dtype: of the weights written; None keeps what they have. A stage-1 model (`SpeechGPT-7B-ma`), whose vocabulary ends
    with `<eosp>`, gains the rows of the four later markers as the published script adds them: N(0, initializer_range),
    here by `seed`. A LLaMA without units stays a base model for `language.base`.

    Returns {"units", "tokens", "parameters", "dtype", "added_markers", "layers"}. Raises ConversionError naming the
    file and what does not fit.
    """
    source, target = Path(source), Path(target)
    files = weights.find(source, NAMES)
    config = _config(source)
    tokenizer, vocabulary, lacking = _vocabulary(source)
    found = {name: shape for name, shape in weights.shapes(files).items() if not _is_buffer(name)}
    _check_vocabulary(source, config, found, len(tokenizer) - len(lacking))
    if config.tie_word_embeddings:
        # transformers 4.33 wrote the one table under both names.
        found.pop("lm_head.weight", None)
    weights.compare(found, _expected(config), f"{source}: config.json does not match the weights")
    if lacking:
        config.vocab_size = len(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    parameters, kinds = 0, set()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal parameters
        for file in files:
            for name, read in weights.read(file).items():
                if name not in found:
                    continue
                tensor = read
                if lacking and name in _VOCABULARY_TABLES:
                    shape = len(lacking), read.shape[1]
                    rows = torch.randn(shape, generator=generator) * config.initializer_range
                    tensor = torch.cat([read, rows.to(read.dtype)])
                tensor = tensor if dtype is None else tensor.to(dtype)
                parameters += tensor.numel()
                kinds.add(tensor.dtype)
                yield name, tensor

    with weights.appearing(target) as folder:
        weights.write(tensors(), folder)
        [kind] = kinds if len(kinds) == 1 else [torch.float32]
        _save_config(config, tokenizer, kind, folder)
        if vocabulary is None:
            tokenizer.save_pretrained(str(folder))
        else:
            vocabulary.save(folder)
            PromptFormat().save(folder)
    return {
        "units": vocabulary.unit_count if vocabulary else 0,
        "tokens": len(tokenizer),
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "dtype": str(kind).removeprefix("torch."),
        "added_markers": lacking,
    }


def _config(source: Path) -> "LlamaConfig":
    from transformers import LlamaConfig

    file = source / "config.json"
    facts = weights.read_json(file)
    classes = [str(name) for name in facts.get("architectures") or ["LlamaForCausalLM"]]
    # Conversions of early 2023 write LLaMAForCausalLM.
    if facts.get("model_type") != "llama" or [name.lower() for name in classes] != ["llamaforcausallm"]:
        raise ConversionError(
            f"{file}: a LlamaForCausalLM is expected, not a {', '.join(classes)} of type {facts.get('model_type')!r}"
        )
    # What is about the process that saved it, not about the model; ids come from the tokenizer.
    for key in ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        facts.pop(key, None)
    if "max_sequence_length" in facts:
        facts.setdefault("max_position_embeddings", facts.pop("max_sequence_length"))
    facts.setdefault("tie_word_embeddings", False)
    return LlamaConfig(**{key: value for key, value in facts.items() if not key.endswith("_token_id")})


def _vocabulary(source: Path) -> "tuple[PreTrainedTokenizerBase, Vocabulary | None, list[str]]":
    """Tokenizer, its units and markers (None for a plain LLaMA), and the markers that the model was not yet taught."""
    file = source / sentencepiece_bpe.FILE
    try:
        tokenizer = sentencepiece_bpe.read(source)
    except (FileNotFoundError, sentencepiece_bpe.SentencePieceError) as error:
        raise ConversionError(str(error)) from None
    settings = source / "tokenizer_config.json"
    if settings.is_file() and weights.read_json(settings).get("legacy") is False:
        raise ConversionError(
            f"{settings}: legacy is false; the published models put a space before each stretch of text, and were "
            "trained on other tokens than this tokenizer gives"
        )
    listed = source / "added_tokens.json"
    added: dict[str, int] = weights.read_json(listed) if listed.is_file() else {}
    added = {token: number for token, number in added.items() if number >= len(tokenizer)}
    if not added:
        return tokenizer, None, []
    units = 0
    while f"<{units}>" in added:
        units += 1
    wanted = [*(f"<{unit}>" for unit in range(units)), *RELEASED_MARKERS]
    for place, token in enumerate(wanted, start=len(tokenizer)):
        if added.get(token, place) != place:
            raise ConversionError(
                f"{listed}: {token} is token {added[token]}; after the {len(tokenizer)} pieces of {file.name} and what "
                f"comes before it, it should be {place}"
            )
    if odd := [token for token in added if token not in wanted]:
        raise ConversionError(f"{listed}: {odd[0]!r} is neither a unit nor a marker of the published models")
    if not units:
        raise ConversionError(f"{listed}: no unit <0> among the added tokens; not a SpeechGPT vocabulary")
    lacking = [token for token in RELEASED_MARKERS if token not in added]
    if lacking != list(RELEASED_MARKERS[len(RELEASED_MARKERS) - len(lacking) :]):
        raise ConversionError(f"{listed}: {lacking[0]} is missing, though markers that come after it are there")
    vocabulary = Vocabulary.grow(tokenizer, units, "released")
    return tokenizer, vocabulary, lacking


def _check_vocabulary(source: Path, config: "LlamaConfig", found: dict[str, tuple[int, ...]], tokens: int) -> None:
    table = _VOCABULARY_TABLES[0]
    rows = found[table][0] if found.get(table) else config.vocab_size
    if config.vocab_size != rows:
        raise ConversionError(
            f"{source}: config.json says vocab_size {config.vocab_size}, {table} has {rows} rows: "
            "the two are of different models"
        )
    if rows < tokens or (rows > tokens and (rows - tokens >= _PADDING or rows % 8)):
        raise ConversionError(
            f"{source}: the tokenizer has {tokens} tokens (tokenizer.model and added_tokens.json), the weights have "
            f"{rows} rows: the tokenizer is another model's"
        )


def _expected(config: "LlamaConfig") -> dict[str, tuple[int, ...]]:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    return expected


def _is_buffer(name: str) -> bool:
    """Rotary frequencies, which transformers before 4.32 wrote beside the weights and which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _save_config(config: "LlamaConfig", tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    from transformers import GenerationConfig

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, number in ids.items():
        setattr(config, name, number)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
