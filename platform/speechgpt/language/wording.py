"""All of a language model but its weights: what makes tokens of words and units, and words and units of tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechgpt.language.prompts import PromptFormat
from speechgpt.language.vocabulary import Vocabulary


@dataclass(frozen=True)
class Wording:
    """context: tokens that a prompt and its reply may have together."""

    vocabulary: Vocabulary
    prompts: PromptFormat
    context: int

    @classmethod
    def load(cls, directory: str | Path) -> "Wording":
        """Read the wording of a model in Hugging Face layout.

        Models without `prompt_format.json` are taken for the published weights, if their vocabulary is theirs. Raises
        FileNotFoundError when one of our own lacks it.
        """
        from transformers import AutoConfig

        vocabulary = Vocabulary.load(directory)
        if Path(directory, PromptFormat.FILE).is_file() or vocabulary.markers == "whole":
            prompts = PromptFormat.load(directory)
        else:
            prompts = PromptFormat()
        return cls(vocabulary, prompts, context_of(AutoConfig.from_pretrained(str(directory))))


def context_of(config: Any) -> int:
    """Of a transformers configuration; one that names no limit has none that matters."""
    return getattr(config, "max_position_embeddings", 1 << 20)
