import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from speechgpt.language.config import LanguageSection
from speechgpt.language.prompts import PromptFormat
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.training.starting import write_base

ROWS = ["[Human]: what is two plus two<eoh>. [SpeechGPT]: it is four<eoa>.", "<sosp><0><1><eosp>"] * 4
ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
CENTROIDS = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


def language(**changes) -> LanguageSection:
    return LanguageSection(**{"architecture": ARCHITECTURE, "text_vocabulary": 300, "pad_vocabulary_to": 64, **changes})


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    return (torch.cdist(embeddings, embeddings) + torch.eye(len(embeddings)) * 1e9).argmin(1)


def test_a_model_from_nothing_speaks_units_and_is_whole_on_disk(tmp_path):
    write_base(tmp_path, language(), None, ROWS, CENTROIDS, seed=1)
    model, vocabulary = AutoModelForCausalLM.from_pretrained(tmp_path), Vocabulary.load(tmp_path)
    assert vocabulary.unit_count == 24
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == vocabulary.padded_size(64)
    assert (model.config.bos_token_id, model.config.pad_token_id) == (vocabulary.bos, vocabulary.pad)
    assert PromptFormat.load(tmp_path) == PromptFormat.of(language())
    assert vocabulary.encode_plain("what is four") == vocabulary.encode_plain("what is four")
    assert len(vocabulary.encode_plain("what is four")) == 3, "the tokenizer has learnt the recipe's words"


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_base(tmp_path / name, language(), None, ROWS, CENTROIDS, seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_units_start_near_the_units_that_sound_alike(tmp_path):
    pairs = CENTROIDS.repeat_interleave(2, 0) + torch.randn(48, 16, generator=torch.Generator().manual_seed(1)) * 0.02
    found = {}
    for init in ("centroids", "random"):
        write_base(tmp_path / init, language(unit_init=init), None, ROWS, pairs, seed=1)
        vocabulary = Vocabulary.load(tmp_path / init)
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / init).get_input_embeddings().weight.detach()
        units = weights[vocabulary.first_unit : vocabulary.first_unit + 48]
        found[init] = (nearest(units) == torch.arange(48) ^ 1).float().mean().item()
        assert units.std().item() == pytest.approx(weights[: vocabulary.first_unit].std().item(), rel=0.1)
    assert found["centroids"] > 0.95
    assert found["random"] < 0.3


def test_a_base_model_keeps_its_text_and_gains_units(tmp_path):
    tokenizer = train_tokenizer(["what is two plus two"] * 5, 290)
    base = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, "tie_word_embeddings": False}, vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    write_base(tmp_path / "grown", language(markers="released"), tmp_path / "base", [], CENTROIDS, seed=1)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, part)().weight, getattr(grown, part)().weight
        assert torch.equal(after[: len(tokenizer)], before)
        assert len(after) == 64 * -(-(len(tokenizer) + 24 + 6) // 64)
    assert Vocabulary.load(tmp_path / "grown").first_unit == len(tokenizer)
