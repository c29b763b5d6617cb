"""Small tokenizers and models of every kind that the language core has to live with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from speechgpt.language.config import Dialect
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import META, TEMPLATES, PromptFormat
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Markers, Vocabulary

WORDS = [*TEMPLATES["paper"].values(), META, "what is two plus three", "two plus three is five"]
UNITS = 40


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with LLaMA's settings, in the files that a LLaMA checkpoint has."""
    directory = tmp_path_factory.mktemp("llama")
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(WORDS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, "legacy": True}))
    LlamaConfig().save_pretrained(directory)
    return directory


@pytest.fixture
def llama_tokenizer(llama_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(llama_directory)


@pytest.fixture
def scratch_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(WORDS * 20, 500)


@pytest.fixture(params=["scratch", "llama", "python"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "python":
        return ByT5Tokenizer()
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def untrained(
    llama_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Dialect, Markers, bool], SpeechLanguageModel]:
    """Random weights: whatever such a model says well-formed is the grammar's doing."""

    def make(dialect: Dialect, markers: Markers, merged: bool = True) -> SpeechLanguageModel:
        base = AutoTokenizer.from_pretrained(llama_directory) if markers == "released" else train_tokenizer(WORDS, 400)
        vocabulary = Vocabulary.grow(base, UNITS, markers, merged)
        torch.manual_seed(1)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary.padded_size(64),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=1024,
                # Confident and varied, so that greedy replies do not hang on the last bits of a tie.
                initializer_range=0.3,
            )
        )
        directory = tmp_path_factory.mktemp(f"{dialect}-{markers}")
        model.save_pretrained(directory)
        vocabulary.save(directory)
        PromptFormat(dialect, "").save(directory)
        return SpeechLanguageModel.load(directory, device="cpu")

    return make
