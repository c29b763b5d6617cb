"""Parts put together: what fits becomes a bundle that is served, what does not is named."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from serve import chat
from speechgpt.interop import assembly
from speechgpt.interop.adapter import convert_adapter
from speechgpt.interop.assembly import Parts, assemble
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.llama import convert_language
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import META, Exchange, row_text
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.runtime import bundle
from speechgpt.speech import hubert
from speechgpt.speech.audio import decode, encode
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.hubert import HubertFeatures
from speechgpt.speech.vocoder import Vocoder
from speechgpt.training.targets import encode as encode_row

NANO = Path(str(bundle.resolve("nano")))
QUESTION, ANSWER = "what is two plus three", "two plus three is five"
SPOKEN = tuple(int(unit) for unit in np.random.default_rng(5).permutation(1000)[:24])


@pytest.fixture(scope="module")
def parts(published, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """All parts as `convert` leaves them: the shipped encoder and vocoder, fitted to a codebook of 1000 units."""
    folder = tmp_path_factory.mktemp("parts")
    convert_language(published.cm, folder / "language")
    convert_adapter(published.com, folder / "adapter")
    shutil.copytree(NANO / "encoder", folder / "encoder", ignore=shutil.ignore_patterns("kmeans*"))
    [frames] = HubertFeatures.load(folder / "encoder")([_speech(30.0)])
    (folder / "codebook").mkdir()
    Codebook(frames[np.random.default_rng(0).choice(len(frames), 1000, replace=False)]).save(folder / "codebook")
    vocoder = Vocoder.load(NANO / "vocoder")
    vocoder.fit_codebook(Codebook.load(folder / "codebook").centroids)
    vocoder.save(folder / "vocoder")
    return Parts(folder / "encoder", folder / "language", folder / "vocoder", folder / "codebook", folder / "adapter")


@pytest.fixture(scope="module")
def taught(published, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The parts with a language model that has learnt one dialogue, from its published files on."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(published.cm, folder / "cm")
    vocabulary, model = Vocabulary.load(parts.language), LlamaForCausalLM.from_pretrained(parts.language)
    _teach(model, list(_rows(vocabulary)))
    torch.save(model.state_dict(), folder / "cm" / "pytorch_model.bin")
    convert_language(folder / "cm", folder / "language")
    return replace(parts, language=folder / "language")


@pytest.fixture(scope="module")
def bundles(taught: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same parts, the adapter stacked and merged, by the command."""
    folder = tmp_path_factory.mktemp("bundles")
    options = [
        f"--{name}={getattr(taught, name)}" for name in ("encoder", "codebook", "language", "adapter", "vocoder")
    ]
    made = {}
    for name, more in (("stacked", [f"--named-adapter=pirate={taught.adapter}"]), ("merged", ["--merge-adapter"])):
        answer = _command(*options, *more, f"--output={folder / name}", "--json")
        assert (answer["units"], answer["markers"], answer["adapter"]) == (1000, "released", name)
        assert answer["digest"] == bundle.load(folder / name).digest
        made[name] = folder / name
    return made


@pytest.mark.slow
def test_the_bundle_holds_every_part(bundles: dict[str, Path], taught: Parts) -> None:
    stacked, merged = (bundle.load(bundles[name]) for name in ("stacked", "merged"))
    assert stacked.part("adapter") and merged.part("adapter") is None
    assert bundle.adapters(stacked.directory) == {"pirate": stacked.directory / "adapters" / "pirate"}
    assert bundle.adapters(merged.directory) == {}
    assert stacked.manifest["unit_vocabulary"] == {
        "name": f"hubert-L{HubertFeatures.load(taught.encoder).layer}-km1000",
        "size": 1000,
        "frames_per_second": 50,
        "merged": True,
    }
    assert stacked.manifest["lineage"]["assembled_from"]["adapter"] == str(taught.adapter)
    same = SpeechEncoder.load(bundles["stacked"] / "encoder").encode([_speech(1.0)])[0].units
    frames = HubertFeatures.load(taught.encoder)([_speech(1.0)])[0]
    assert same.tolist() == [
        u for u, before in _pairs(Codebook.load(taught.codebook).assign(frames).tolist()) if u != before
    ]


@pytest.mark.slow
def test_a_merged_adapter_is_the_stacked_one(bundles: dict[str, Path], taught: Parts) -> None:
    stacked = SpeechLanguageModel.load(bundles["stacked"] / "language", bundles["stacked"] / "adapter", "cpu")
    merged = SpeechLanguageModel.load(bundles["merged"] / "language", device="cpu")
    plain = SpeechLanguageModel.load(taught.language, device="cpu")
    ids = torch.tensor([merged.vocabulary.encode_prompt(merged.prompts.transcription(SPOKEN))])
    with torch.inference_mode():
        one, other, without = (each.model(ids).logits for each in (stacked, merged, plain))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert (one - without).abs().max() > 1e-3
    assert merged.prompts == stacked.prompts == plain.prompts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stacked", "merged"])
def test_it_is_talked_to(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    recording = tmp_path / "question.wav"
    recording.write_bytes(encode(_speech(1.5), "wav"))
    spoken = _chat(bundles[name], str(recording), tmp_path / "out")
    assert (spoken["transcript"], spoken["text"]) == (QUESTION, ANSWER)
    assert spoken["bundle"] == bundle.load(bundles[name]).digest
    sound = decode(tmp_path / "out" / spoken["audio"])
    # 24 units of at least a frame each.
    assert len(sound) >= 24 * 320 and np.abs(sound).max() > 1e-3
    written = _chat(bundles[name], QUESTION, tmp_path / "out")
    assert (written["text"], written["audio"]) == (ANSWER, "wav/answer_1.wav")


def test_a_hugging_face_encoder_needs_its_layer(parts: Parts, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(parts.encoder, foreign, ignore=shutil.ignore_patterns(hubert.UNIT_CONFIG))
    other = replace(parts, encoder=foreign, adapter=None)
    with pytest.raises(ConversionError, match="give --layer"):
        assemble(other, tmp_path / "none")
    layer = HubertFeatures.load(parts.encoder).layer
    with pytest.raises(ConversionError, match=f"layer 99; the model has layers 1 to {layer}"):
        assemble(replace(other, layer=99), tmp_path / "none")
    assemble(replace(other, layer=layer), tmp_path / "bundle")
    ours = SpeechEncoder(HubertFeatures.load(parts.encoder), Codebook.load(parts.codebook)).encode([_speech(1.0)])
    theirs = SpeechEncoder.load(tmp_path / "bundle" / "encoder").encode([_speech(1.0)])
    assert np.array_equal(ours[0].units, theirs[0].units)


def _narrow_codebook(parts: Parts, folder: Path) -> dict[str, Path]:
    Codebook(torch.randn(1000, 8)).save(folder)
    return {"codebook": folder}


def _small_codebook(parts: Parts, folder: Path) -> dict[str, Path]:
    Codebook(torch.randn(40, _width(parts))).save(folder)
    return {"codebook": folder}


def _other_vocoder(parts: Parts, folder: Path) -> dict[str, Path]:
    vocoder = Vocoder.load(NANO / "vocoder")
    vocoder.fit_codebook(torch.randn(40, _width(parts)))
    vocoder.save(folder)
    return {"vocoder": folder}


def _width(parts: Parts) -> int:
    return Codebook.load(parts.codebook).centroids.shape[1]


def _other_language(parts: Parts, folder: Path) -> dict[str, Path]:
    Vocabulary.grow(train_tokenizer([QUESTION, ANSWER], 300), 40, "whole").save(folder)
    LlamaConfig().save_pretrained(folder)
    return {"language": folder}


def _no_language(parts: Parts, folder: Path) -> dict[str, Path]:
    return {"language": parts.encoder}


def _changed_adapter(parts: Parts, folder: Path, change: Any) -> dict[str, Path]:
    assert parts.adapter is not None
    shutil.copytree(parts.adapter, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    return {"adapter": folder}


def _wide_adapter(parts: Parts, folder: Path) -> dict[str, Path]:
    return _changed_adapter(parts, folder, lambda state: {name: t.repeat(2, 2) for name, t in state.items()})


def _short_adapter(parts: Parts, folder: Path) -> dict[str, Path]:
    return _changed_adapter(
        parts, folder, lambda state: {name: t for name, t in state.items() if ".layers.1." not in name}
    )


def _no_vocoder(parts: Parts, folder: Path) -> dict[str, Path]:
    return {"vocoder": folder / "gone"}


def _pickled_encoder(parts: Parts, folder: Path) -> dict[str, Path]:
    shutil.copytree(parts.encoder, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return {"encoder": folder}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_narrow_codebook, r"codebook \S+ has 8 dimensions, encoder \S+ \d+"),
        (_small_codebook, r"codebook \S+ has 40 units, language model \S+ 1000"),
        (_other_vocoder, r"codebook \S+ has 1000 units, vocoder \S+ 40"),
        (_other_language, r"codebook \S+ has 1000 units, language model \S+ 40"),
        (_no_language, r"language model \S+: no tokenizer\.json; take a published model"),
        (_wide_adapter, r"adapter \S+ is for a model of width 64, language model \S+ has 32"),
        (_short_adapter, r"adapter \S+ is for a model of 1 layers, language model \S+ has 2"),
        (_no_vocoder, r"gone: no such directory"),
        (_pickled_encoder, r"no model\.safetensors; other formats are pickles"),
    ],
)
def test_parts_that_do_not_fit_are_both_named(change: Any, said: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    changed = replace(parts, **change(parts, tmp_path / "part"))
    with pytest.raises(ConversionError, match=said):
        assemble(changed, tmp_path / "bundle")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["part"]


def test_the_command_says_it_in_words(parts: Parts, tmp_path: Path) -> None:
    small = _small_codebook(parts, tmp_path)["codebook"]
    options = [f"--{name}={getattr(parts, name)}" for name in ("encoder", "language", "vocoder")]
    app = typer.Typer()
    app.command()(assembly.main)
    failed = CliRunner().invoke(app, [*options, f"--codebook={small}", f"--output={tmp_path / 'bundle'}"])
    assert failed.exit_code == 1 and "has 40 units, language model" in failed.stderr
    misused = CliRunner().invoke(app, [*options, "--merge-adapter", f"--output={tmp_path / 'bundle'}"])
    assert misused.exit_code == 2


def _command(*words: str) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(assembly.main)
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def _chat(directory: Path, question: str, output: Path) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(chat.main)
    done = CliRunner().invoke(app, [str(directory), f"--ask={question}", f"--output-dir={output}", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def _speech(seconds: float) -> np.ndarray:
    """A gliding tone in syllables, which the encoder hears as changing units. float32 [samples] at 16 kHz."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(0).normal(0, 0.02, len(time))
    pitch = 220 + 100 * np.sin(2 * np.pi * 0.7 * time)
    return (0.4 * np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * pitch * time) + noise).astype(np.float32)


def _pairs(frames: list[int]) -> Iterator[tuple[int, int]]:
    return zip(frames, [-1, *frames], strict=False)


def _rows(vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The dialogue, asked aloud in units that differ each time, and in writing, as tokens and loss weights."""
    draw = np.random.default_rng(0)
    for count in (8, 16, 24, 32, 40, 56, 72, 90):
        heard = tuple(int(unit) for unit in draw.permutation(1000)[:count])
        text = row_text("released", [Exchange("s2s", QUESTION, ANSWER, heard, SPOKEN)])
        yield encode_row(vocabulary, META, text, "reply", 1.0)
    text = row_text("released", [Exchange("t2s", QUESTION, ANSWER, answer_units=SPOKEN)])
    yield encode_row(vocabulary, META, text, "reply", 1.0)


def _teach(model: LlamaForCausalLM, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor(np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in rows]), dtype=torch.long)
    learnt = torch.tensor(np.stack([np.pad(weights, (0, longest - len(weights))) for _, weights in rows])) > 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[learnt[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learnt[:, 1:]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
