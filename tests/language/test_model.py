"""Loading: plain, with an adapter, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from speechgpt.language.config import GenerationSection
from speechgpt.language.model import BATCH_ROWS, SpeechLanguageModel
from speechgpt.language.prompts import PromptFormat, Turn
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary

GREEDY = GenerationSection(temperature=0, max_new_tokens=8, max_text_tokens=5)

RELEASED = PromptFormat("released", "")


def save(directory, markers="whole", rows=None, prompts: PromptFormat | None = RELEASED):
    vocabulary = Vocabulary.grow(train_tokenizer(["what is two"], 300), 10, markers)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows or vocabulary.size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=150,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(directory)
    vocabulary.save(directory)
    if prompts:
        prompts.save(directory)
    return model


def test_an_adapter_is_stacked_on_the_model(tmp_path):
    base = save(tmp_path / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = SpeechLanguageModel.load(tmp_path / "model")
    stacked = SpeechLanguageModel.load(tmp_path / "model", tmp_path / "adapter")
    asked = [[1, 2, 3], [4, 5]]
    ids = torch.tensor([[1, 5, 6]])
    with torch.inference_mode():
        assert not torch.allclose(plain.model(ids).logits, stacked.model(ids).logits)
        assert torch.allclose(stacked.model(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert stacked.transcribe(asked, GREEDY) == stacked.transcribe(asked, GREEDY)


def test_our_own_model_without_its_prompt_format_is_refused(tmp_path):
    save(tmp_path, prompts=None)
    with pytest.raises(FileNotFoundError, match=r"prompt_format\.json"):
        SpeechLanguageModel.load(tmp_path)


def test_published_weights_are_asked_in_their_dialect(tmp_path):
    save(tmp_path, markers="released", prompts=None)
    (tmp_path / "unit_vocabulary.json").unlink()
    assert SpeechLanguageModel.load(tmp_path).prompts == PromptFormat()
    assert PromptFormat().dialect == "released"


def test_a_model_that_never_grew_is_refused(tmp_path):
    save(tmp_path, rows=200)
    with pytest.raises(ValueError, match="200 embeddings for a vocabulary of"):
        SpeechLanguageModel.load(tmp_path)


def test_a_vocabulary_that_changed_is_refused(tmp_path):
    save(tmp_path)
    facts = json.loads((tmp_path / "unit_vocabulary.json").read_text())
    (tmp_path / "unit_vocabulary.json").write_text(json.dumps({**facts, "units": 11}))
    with pytest.raises(ValueError, match="no token '<10>'"):
        SpeechLanguageModel.load(tmp_path)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, the model's context 150"):
        SpeechLanguageModel.load(tmp_path).transcribe([[1], [1, 2] * 80], GREEDY)


def test_a_reply_stops_where_the_context_ends(tmp_path):
    save(tmp_path)
    model = SpeechLanguageModel.load(tmp_path)
    endless = GenerationSection(temperature=0, max_new_tokens=200)
    prompts = [model.prompts.speaking("what " * n) for n in (1, 60)]
    together = model.reply(prompts, "speak", endless)
    assert together == [model.reply([prompt], "speak", endless)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        if answer.finish == "length":
            assert len(model.vocabulary.encode_prompt(prompt)) + 1 + len(answer.units or []) <= 151


def test_spoken_history_is_transcribed_first(tmp_path):
    save(tmp_path)
    model = SpeechLanguageModel.load(tmp_path)
    heard = model.transcribe([[1, 2]], GREEDY)[0]
    assert heard
    past = [Turn("user", units=[1, 2]), Turn("assistant", text="it is two"), Turn("user", units=[3])]
    known = [Turn("user", text=heard, units=[1, 2]), *past[1:]]
    assert model.answer([past], "text", GREEDY) == model.answer([known], "text", GREEDY)


def test_many_are_answered_in_their_own_order(tmp_path):
    save(tmp_path)
    model = SpeechLanguageModel.load(tmp_path)
    asked = [[unit % 10, (unit + 1) % 10] * (1 + unit % 7) for unit in range(BATCH_ROWS + 5)]
    together = model.transcribe(asked, GREEDY)
    assert len(together) == len(asked)
    for place in (0, 3, 6, BATCH_ROWS, BATCH_ROWS + 4):
        assert together[place] == model.transcribe([asked[place]], GREEDY)[0]


def test_nothing_asked_nothing_answered(tmp_path):
    save(tmp_path)
    model = SpeechLanguageModel.load(tmp_path)
    assert model.answer([], "chain", GREEDY) == model.transcribe([], GREEDY) == model.speak([], GREEDY) == []


def test_on_a_cpu_in_the_precision_that_is_wanted_and_there(tmp_path, monkeypatch):
    save(tmp_path).bfloat16().save_pretrained(tmp_path)
    assert SpeechLanguageModel.load(tmp_path, device="cpu").model.dtype == torch.float32
    monkeypatch.setattr("speechgpt.language.model.multiplies_bfloat16", lambda: True)
    assert SpeechLanguageModel.load(tmp_path, device="cpu", precision="bfloat16").model.dtype == torch.bfloat16
    monkeypatch.setattr("speechgpt.language.model.multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="bfloat16: this processor has no instructions"):
        SpeechLanguageModel.load(tmp_path, device="cpu", precision="bfloat16")
