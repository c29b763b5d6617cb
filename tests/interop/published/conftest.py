"""Published language models in small: true vocabulary, files and names, random weights."""

import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechgpt.language import world
from speechgpt.language.config import WorldSection
from speechgpt.runtime import cache

SCRIPT = Path(__file__).with_name("transformers_4_33.py")
ENVIRONMENT = ("transformers==4.33.1", "sentencepiece", "protobuf", "numpy<2.5")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


class Published(NamedTuple):
    """Directories as transformers 4.33.1 and PEFT 0.3 wrote them."""

    llama: Path
    ma: Path
    cm: Path
    com: Path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """English and code that every machine has: the world's questions and the standard library's documentation."""
    questions = [question.question for question in world.load(WorldSection(), 1).questions()]
    return questions + list(_documentation())


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A SentencePiece model of 32,000 pieces in LLaMA's settings; LLaMA's own may not be passed on."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=32000,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def transformers_4_33() -> Callable[..., str]:
    """Runs the script beside this file in an environment of its own, which the cache keeps. Gives its output."""
    try:
        folder = cache.keep("environments/transformers-4.33.1", _install)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"transformers 4.33.1 cannot be installed here: {error.stderr[-300:]}")
    environment = {"PATH": os.defpath, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def run(*arguments: str, given: str = "") -> str:
        command = [str(folder / "bin" / "python"), str(SCRIPT), *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> Published:
    """Written here with the names and shapes that 4.33.1 and PEFT 0.3 gave them; `test_tokens` compares the tokenizer's
    files with those that 4.33.1 itself writes."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    units = [f"<{unit}>" for unit in range(1000)]
    ma = _model(root / "ma", pieces, [*units, "<sosp>", "<eosp>"])
    cm = _model(root / "cm", pieces, [*units, "<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", "<eos>"])
    return Published(_model(root / "llama", pieces, []), ma, cm, _adapter(root / "com"))


@pytest.fixture(scope="session")
def mixtures() -> Callable[..., list[str]]:
    return _mixtures


def _mixtures(texts: list[str], count: int, seed: int) -> list[str]:
    """Text, units and markers in every order, with the white space and letters on which tokenizers differ."""
    draw = random.Random(seed)
    markers = ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", "<eos>", "<eoa>", "[tq]", "[ta]", "[ua]"]
    gaps = [" ", "  ", "\n", "\t", "\u3000", "\xa0", ". ", ": ", "; ", "   \n", "\r\n", "\u200b", "\x1f", "▁", "▁▁"]

    def letters() -> str:
        ranges = ((1, 128), (0xA0, 0x3000), (0x1F300, 0x1F700))
        return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(1, 9)))

    makers = [
        (0.25, lambda: draw.choice(markers)),
        (0.15, lambda: "".join(f"<{draw.randrange(1000)}>" for _ in range(draw.randrange(1, 6)))),
        (0.2, lambda: draw.choice(texts)),
        (0.1, lambda: draw.choice(gaps)),
        (0.1, lambda: draw.choice("ab =-▁*. ") * draw.randrange(1, 40)),
        (0.1, letters),
        (0.1, lambda: f" {draw.choice(draw.choice(texts).split() or ['x'])}{draw.choice(['', ',', ' '])}"),
    ]
    weights, choices = zip(*makers, strict=True)
    return ["".join(make() for make in draw.choices(choices, weights, k=draw.randrange(1, 12))) for _ in range(count)]


def _documentation() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from filter(str.strip, (ast.get_docstring(node) or "").splitlines())


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *ENVIRONMENT]
    subprocess.run(install, capture_output=True, text=True, check=True)


def _model(folder: Path, pieces: Path, added: list[str]) -> Path:
    folder.mkdir()
    config = LlamaConfig(**SMALL, vocab_size=32000 + len(added), tie_word_embeddings=False)
    state = {name: tensor.clone() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for layer in range(config.num_hidden_layers):
        # transformers before 4.32 kept the rotary frequencies beside the weights.
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    if added:
        (folder / "added_tokens.json").write_text(
            json.dumps({token: 32000 + place for place, token in enumerate(added)}, indent=2, sort_keys=True)
        )
    facts = {
        "_name_or_path": "output/stage2",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llama",
        "num_key_value_heads": SMALL["num_attention_heads"],
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **SMALL,
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {name: {"__type": "AddedToken", "content": content, **special} for name, content in names.items()}
    settings = {**tokens, "legacy": None, "pad_token": None, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": "<unk>"}, indent=2))
    return folder


def _adapter(folder: Path) -> Path:
    """The names of PEFT 0.3 (no `.default`), and its configuration's keys."""
    folder.mkdir()
    state = {}
    for layer in range(SMALL["num_hidden_layers"]):
        for name in ("q_proj", "v_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            state[f"{module}.lora_A.weight"] = torch.randn(8, SMALL["hidden_size"]) * 0.05
            state[f"{module}.lora_B.weight"] = torch.randn(SMALL["hidden_size"], 8) * 0.05
    torch.save(state, folder / "adapter_model.bin")
    facts = {
        "base_model_name_or_path": "output/stage2",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
    return folder
