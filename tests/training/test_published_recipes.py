"""The stages of `speechgpt-7b` and `speechgpt-13b`, a few steps each, on a LLaMA small enough for a test."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import META, Exchange, Kind, descriptions, row_text
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.recipe import Recipe, load
from speechgpt.speech.units import format_units
from speechgpt.training import blocks, engine, loop, packing, starting
from speechgpt.training.export import export
from speechgpt.training.mixture import draw
from speechgpt.training.objective import Objective
from speechgpt.training.targets import encode

SMALLER = (
    "engine={workers: 1, zero_stage: 2}",
    *(
        f"stages.{stage}.{key}"
        for stage in ("adaptation", "crossmodal", "chain")
        for key in ("steps=2", "micro_batch=1")
    ),
)
QUESTION, ANSWER = "what is two plus three", "two plus three is five"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's files and architecture with few pieces and little width."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "corpus.txt").write_text("\n".join([META, QUESTION, ANSWER, *descriptions("transcribe")] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
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
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**small, vocab_size=600, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speechgpt-7b", "speechgpt-13b"])
def test_every_stage_takes_steps_from_the_one_before(name: str, llama: Path, tmp_path: Path) -> None:
    recipe = load(name, (f"language.base={llama}", *SMALLER))
    starting.write_base(tmp_path / "base", recipe.language, llama, [], torch.randn(1000, 8), recipe.seed)
    vocabulary = Vocabulary.load(tmp_path / "base")
    assert (vocabulary.first_unit, vocabulary.size, vocabulary.markers) == (600, 1606, "released")
    for stage in recipe.stages:
        _train(recipe, stage, tmp_path)
        vocabulary, prompts = starting.interface(tmp_path / "base")
        if recipe.stages[stage].lora is None:
            vocabulary.save(tmp_path / stage)
            prompts.save(tmp_path / stage)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("base", "crossmodal"))
    assert all(not torch.equal(before[tensor], after[tensor]) for tensor in before), "all weights learn in two stages"
    spoken = SpeechLanguageModel.load(tmp_path / "crossmodal", tmp_path / "chain", device="cpu")
    small = recipe.generation.model_copy(update={"max_new_tokens": 12})
    assert spoken.prompts.dialect == recipe.language.dialect
    assert spoken.speak([QUESTION], small, seed=1) == spoken.speak([QUESTION], small, seed=1)


def _train(recipe: Recipe, name: str, folder: Path) -> None:
    """One stage as the job's worker trains it, in this process."""
    stage = recipe.stages[name]  # type: ignore[index]
    start = folder / (stage.start_from or "base")
    vocabulary, _ = starting.interface(start)
    rows = {kind: _row(recipe, kind) for kind in stage.mixture}
    encoded = [encode(vocabulary, *row, stage.loss_on, stage.unit_weight) for row in rows.values()]
    lengths = [len(ids) for ids, _ in encoded]
    planned = packing.plan(draw(list(rows), ["any"] * len(rows), stage.mixture, recipe.seed), lengths, stage.block)
    count = stage.steps * stage.micro_batch * stage.accumulation
    packed = [packing.pack([encoded[n] for n in next(planned)], stage.block, vocabulary.pad) for _ in range(count)]
    blocks.write(folder / f"{name}.arrow", [blocks.table(range(count), packed)], stage.block)
    engine.join(recipe.engine)
    model = starting.load(start, recipe.engine.gradient_checkpointing)
    if stage.lora:
        model = starting.add_lora(model, stage.lora, stage.start_from, recipe.seed)
    objective = Objective(model, vocabulary.first_unit, vocabulary.unit_count)
    started = engine.under_zero(objective, recipe.engine, stage, engine.configuration(recipe.engine, stage, 1))
    store = _Forgetful()
    loop.train(started, blocks.Blocks(folder / f"{name}.arrow"), stage, store.report, store)
    assert [figures["step"] for figures in store.figures if "loss" in figures] == [1, 2]
    export(started, folder / name)


class _Forgetful:
    """A checkpoint store that has none to go on from, and keeps the figures."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []

    def report(self, figures: dict[str, float], directory: Path | None) -> None:
        self.figures.append(figures)

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        return iter(())


def _row(recipe: Recipe, kind: str) -> tuple[str, str]:
    """Prefix and text of a row of this kind, in the recipe's dialect."""
    heard, spoken = tuple(range(0, 90, 3)), tuple(range(500, 540))
    if kind == "units":
        return "", format_units(heard)
    asked: Kind = kind  # type: ignore[assignment]
    question, answer = (ANSWER, "") if kind == "speak" else (QUESTION, QUESTION if kind == "transcribe" else ANSWER)
    wording = descriptions(asked)[0] if asked in ("transcribe", "speak") else ""
    return META, row_text(recipe.language.dialect, [Exchange(asked, question, answer, heard, spoken, wording)])
