"""Published language models in our layout: the same weights, and no model that is not what its files say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

from speechgpt.interop import weights
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.llama import convert_language
from speechgpt.language.config import LanguageSection
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import PromptFormat
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.training.starting import write_base

Spoil = Callable[[Path], None]


@pytest.fixture
def copy(published, tmp_path: Path) -> Path:
    """A published model to spoil."""
    return Path(shutil.copytree(published.cm, tmp_path / "cm"))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "pytorch_model.bin", weights_only=True)


def test_the_weights_are_the_published_ones(published, tmp_path: Path) -> None:
    figures = convert_language(published.cm, tmp_path / "language")
    before = {name: tensor for name, tensor in tensors(published.cm).items() if "inv_freq" not in name}
    after = load_file(tmp_path / "language" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (figures["units"], figures["tokens"], figures["added_markers"]) == (1000, 33006, [])
    assert figures["parameters"] == sum(tensor.numel() for tensor in before.values())
    model = SpeechLanguageModel.load(tmp_path / "language", device="cpu")
    assert (model.prompts, model.vocabulary.markers) == (PromptFormat(), "released")
    assert (model.model.config.bos_token_id, model.model.config.eos_token_id) == (1, 2)


def test_the_same_model_gives_the_same_bytes(published, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_language(published.cm, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_weights_in_another_precision(published, tmp_path: Path) -> None:
    assert convert_language(published.cm, tmp_path / "half", torch.bfloat16)["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    before = tensors(published.cm)["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, before.to(torch.bfloat16))


def test_shards_in_and_shards_out(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors(copy)
    (copy / "pytorch_model.bin").unlink()
    names = list(whole)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:])):
        shard = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save({name: whole[name] for name in part}, copy / shard)
        weight_map |= dict.fromkeys(part, shard)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    monkeypatch.setattr(weights, "SHARD_BYTES", 3_000_000)
    convert_language(copy, tmp_path / "language")
    assert len(list((tmp_path / "language").glob("model-*-of-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())

    (copy / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match="2 shards, of which pytorch_model-00002-of-00002.bin is missing"):
        convert_language(copy, tmp_path / "again")


def test_a_stage_one_model_gains_the_later_markers(published, tmp_path: Path) -> None:
    figures = convert_language(published.ma, tmp_path / "language")
    assert figures["added_markers"] == ["[Human]", "[SpeechGPT]", "<eoh>", "<eos>"]
    before, after = tensors(published.ma), load_file(tmp_path / "language" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:33002], before[name])
        assert after[name].shape[0] == 33006
        assert after[name][33002:].std().item() == pytest.approx(0.02, rel=0.3)
    assert SpeechLanguageModel.load(tmp_path / "language", device="cpu").vocabulary.human == 33002


def test_a_plain_llama_becomes_a_base_model(published, tmp_path: Path) -> None:
    assert convert_language(published.llama, tmp_path / "base")["units"] == 0
    reference = SentencePieceProcessor(model_file=str(published.llama / "tokenizer.model"))
    section = LanguageSection(base=str(tmp_path / "base"), markers="released", pad_vocabulary_to=1)
    for name, base in (("converted", tmp_path / "base"), ("as-it-was", published.llama)):
        write_base(tmp_path / name, section, base, [], torch.randn(1000, 8), seed=1)
        vocabulary = Vocabulary.load(tmp_path / name)
        assert (vocabulary.first_unit, vocabulary.size) == (32000, 33006)
        # A space before a text that begins with one, as 4.33 has it and transformers 5 has not.
        assert vocabulary.encode("  what [Human]") == [*reference.encode("  what"), vocabulary.human]
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "as-it-was")
    assert torch.equal(grown.lm_head.weight[:32000], tensors(published.llama)["lm_head.weight"])


def test_training_goes_on_from_a_published_model(published, tmp_path: Path) -> None:
    convert_language(published.cm, tmp_path / "cm")
    section = LanguageSection(base=str(tmp_path / "cm"), markers="released", dialect="released")
    write_base(tmp_path / "start", section, tmp_path / "cm", [], torch.randn(1000, 8), seed=1)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cm", "start"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert Vocabulary.load(tmp_path / "start").size == 33006
    with pytest.raises(ValueError, match="knows 1000 units and released markers; the codebook has 500 units"):
        write_base(tmp_path / "other", section, tmp_path / "cm", [], torch.randn(500, 8), seed=1)


def change_json(name: str, **changes: object) -> Spoil:
    def spoil(directory: Path) -> None:
        facts = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(facts | changes))

    return spoil


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        state = tensors(directory)
        change(state)
        torch.save(state, directory / "pytorch_model.bin")

    return spoil


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def overwrite(name: str, content: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(content) and None


def cut(directory: Path) -> None:
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def code_inside(directory: Path) -> None:
    torch.save({"model.norm.weight": Dangerous()}, directory / "pytorch_model.bin")


class Dangerous:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove("pytorch_model.bin"), "no weights: none of model.safetensors, pytorch_model.bin"),
        (remove("config.json"), r"config\.json is missing"),
        (remove("tokenizer.model"), r"tokenizer\.model is missing"),
        (overwrite("config.json", b"{"), r"config\.json: not JSON"),
        (overwrite("tokenizer.model", b"nothing"), r"tokenizer\.model: not a SentencePiece model"),
        (overwrite("pytorch_model.bin", b"nothing"), r"pytorch_model\.bin: .*damaged"),
        (cut, r"pytorch_model\.bin: cut off or damaged"),
        (code_inside, r"pytorch_model\.bin: refused, for it asks for "),
        (change_tensors(lambda state: state.update(note="x")), r"'note' holds a str"),
        (change_json("config.json", model_type="opt"), "a LlamaForCausalLM is expected"),
        (change_json("config.json", architectures=["GPT2LMHeadModel"]), "not a GPT2LMHeadModel"),
        (change_json("config.json", vocab_size=32000), "says vocab_size 32000, .* has 33006 rows"),
        (change_json("config.json", num_hidden_layers=3), r"config\.json does not match.*layers\.2\.\S+ is missing"),
        (change_json("config.json", num_hidden_layers=1), r"layers\.1\.\S+ is not part of such a model"),
        (change_json("config.json", intermediate_size=48), r"gate_proj\.weight is \[64, 32\], not \[48, 32\]"),
        (change_json("config.json", num_key_value_heads=2), r"k_proj\.weight is \[32, 32\], not \[16, 32\]"),
        (change_tensors(lambda state: state.pop("lm_head.weight")), r"lm_head\.weight is missing"),
        (change_json("tokenizer_config.json", legacy=False), "legacy is false"),
        (change_json("added_tokens.json", **{"[Human]": 33003, "[SpeechGPT]": 33002}), r"\[Human\] is token 33003"),
        (change_json("added_tokens.json", **{"<eoa>": 33006}), "'<eoa>' is neither a unit nor a marker"),
        (overwrite("added_tokens.json", b'{"<eot>": 32000}'), "'<eot>' is neither"),
        (remove("added_tokens.json"), "the tokenizer has 32000 tokens .* the weights have 33006 rows"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    spoil: Spoil, said: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(copy)
    with pytest.raises(ConversionError, match=said):
        convert_language(copy, tmp_path / "language")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cm"], "nothing is left behind, nothing was run"


def test_a_target_in_use_is_kept(published, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear to me")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert_language(published.cm, tmp_path)
    assert (tmp_path / "mine").read_text() == "dear to me"


def test_an_index_cannot_name_files_elsewhere(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(ConversionError, match="outside its directory"):
        convert_language(copy, tmp_path / "language")
