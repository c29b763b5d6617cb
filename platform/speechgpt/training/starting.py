"""What a stage starts from: a base model with a grown vocabulary or an earlier stage's model; LoRA where asked."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from speechgpt.language.config import LanguageSection
from speechgpt.language.embeddings import centroid_embeddings
from speechgpt.language.prompts import PromptFormat
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.segments import RELEASED_MARKERS, TAG_MARKERS
from speechgpt.language.vocabulary import FILE as UNIT_VOCABULARY
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.training import abilities, pretrained, row_attention
from speechgpt.training.config import LoraSection

if TYPE_CHECKING:
    from peft import PeftModel

_CONTROL = re.compile("|".join(map(re.escape, RELEASED_MARKERS + TAG_MARKERS)) + r"|<\d+>")


def write_base(
    directory: Path,
    language: LanguageSection,
    base: str | Path | None,
    rows: Iterable[str],
    centroids: torch.Tensor,
    seed: int,
) -> None:
    """Write the model that a recipe's first stage starts from: Hugging Face layout, tokenizer, prompt format.

    base: as `pretrained.load` takes it; None makes a LLaMA of `language.architecture` with random
    weights and trains its tokenizer on the text of `rows` (SpeechInstruct strings). A directory with a unit vocabulary,
    such as a converted SpeechGPT, is taken as it is; ValueError if it knows other units.

    centroids: [units, dimensions].
    """
    torch.manual_seed(seed)
    if base is not None and Path(base, UNIT_VOCABULARY).is_file():
        _write_grown(directory, language, Path(base), len(centroids))
        return
    if base is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(_texts(rows), language.text_vocabulary)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        architecture = LlamaConfig(**{**language.architecture, "vocab_size": len(tokenizer), **ids})
        model = AutoModelForCausalLM.from_config(architecture)
    else:
        tokenizer, model = pretrained.load(base)
    vocabulary = Vocabulary.grow(tokenizer, len(centroids), language.markers)
    _grow_embeddings(model, vocabulary, language, centroids, seed)
    model.config.pad_token_id = model.generation_config.pad_token_id = vocabulary.pad
    model.save_pretrained(directory)
    vocabulary.save(directory)
    PromptFormat.of(language).save(directory)


def write_base_with_new_units(
    directory: Path, language: LanguageSection, base: Path, centroids: torch.Tensor, seed: int
) -> None:
    """As `write_base`, from a model that knows as many units of another encoder: what it knows of text stays.

    Raises ValueError for another number of units or other markers.
    """
    vocabulary = _write_grown(directory, language, base, len(centroids))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    first, last = vocabulary.first_unit, vocabulary.first_unit + vocabulary.unit_count
    for embeddings in (_table(model.get_output_embeddings()), _table(model.get_input_embeddings())):
        spread = float(embeddings[first:last].std())
        embeddings[first:last] = centroid_embeddings(centroids, embeddings.shape[1], spread, seed)
    model.save_pretrained(directory)


def _write_grown(directory: Path, language: LanguageSection, base: Path, units: int) -> Vocabulary:
    """Raises ValueError unless the model knows as many units, and the recipe's markers."""
    vocabulary = Vocabulary.load(base)
    if (vocabulary.unit_count, vocabulary.markers) != (units, language.markers):
        raise ValueError(
            f"language.base: {base} knows {vocabulary.unit_count} units and {vocabulary.markers} markers; the codebook "
            f"has {units} units, language.markers is {language.markers}"
        )
    AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(directory)
    vocabulary.save(directory)
    PromptFormat.of(language).save(directory)
    return vocabulary


def interface(directory: Path) -> tuple[Vocabulary, PromptFormat]:
    """How a model is spoken to, which every stage hands on unchanged."""
    return Vocabulary.load(directory), PromptFormat.load(directory)


def load(directory: Path, gradient_checkpointing: bool, int8: bool = False) -> PreTrainedModel:
    """A causal model for training on packed blocks, in float32: DeepSpeed keeps the master copy and casts.

    int8: its linear layers in eight bits, to be frozen under LoRA; AbilityError where bitsandbytes is not installed.
    """
    options: dict[str, Any] = {}
    if int8:
        abilities.require_int8()
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    # flash_attention_2 would keep packed rows apart only in batches of one.
    attention = row_attention.implementation(AutoConfig.from_pretrained(directory, local_files_only=True))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, **options
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def add_lora(model: PreTrainedModel, lora: LoraSection, base_name: str, seed: int) -> "PeftModel":
    """The model with trainable low-rank adapters, everything else frozen; `base_name` is what the adapter will name."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model.enable_input_require_grads()
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def _texts(rows: Iterable[str]) -> Iterator[str]:
    """The stretches of ordinary text between markers and units."""
    for row in rows:
        yield from (stretch.strip() for stretch in _CONTROL.split(row) if stretch.strip())


def _grow_embeddings(
    model: PreTrainedModel, vocabulary: Vocabulary, language: LanguageSection, centroids: torch.Tensor, seed: int
) -> None:
    """Rows for units and markers, of the spread that the base's embeddings have."""
    spread = float(_table(model.get_input_embeddings()).std())
    model.resize_token_embeddings(vocabulary.padded_size(language.pad_vocabulary_to), mean_resizing=False)
    first, count = vocabulary.first_unit, vocabulary.unit_count
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for embeddings in (_table(model.get_output_embeddings()), _table(model.get_input_embeddings())):
            new = embeddings[first:]
            new.copy_(torch.randn(new.shape, generator=generator) * spread)
        if language.unit_init == "centroids":
            units = centroid_embeddings(centroids, embeddings.shape[1], spread, seed)
            embeddings[first : first + count] = units.to(embeddings.dtype)


def _table(layer: torch.nn.Module) -> torch.Tensor:
    """The weights [vocabulary, hidden] of an embedding or of the head, to be changed in place."""
    return layer.get_parameter("weight").detach()
