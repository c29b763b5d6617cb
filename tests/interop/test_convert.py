"""`speechgpt convert` as a command: kinds told by content, exit codes, nothing half-written."""

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from speechgpt.interop.hubert import to_fairseq
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.hubert import scratch

ARCHITECTURE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.65,
}


@pytest.fixture
def hubert(tmp_path: Path) -> Path:
    file = tmp_path / "hubert.pt"
    torch.save(to_fairseq(scratch(ARCHITECTURE, seed=0).eval(), False, "x"), file)
    return file


def kmeans(file: Path, width: int) -> Path:
    points = np.random.default_rng(0).normal(size=(100, width)).astype(np.float32)
    joblib.dump(MiniBatchKMeans(6, n_init=1, random_state=0).fit(points), file)
    return file


def left_behind(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_an_encoder_is_put_together(hubert: Path, convert: Any, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    done = convert(hubert, "--output", target, "--layer", 2, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["kind"] == "hubert"
    assert facts["files"] == sorted(file.name for file in target.iterdir())
    done = convert(kmeans(tmp_path / "km.bin", 16), "--output", target)
    assert done.exit_code == 0, done.stderr
    assert "clusters  6" in done.stdout
    encoder = SpeechEncoder.load(target)
    assert encoder.name == "hubert-L2-km6"
    assert len(encoder.encode([np.zeros(16_000, np.float32)])[0].units) >= 1
    assert left_behind(tmp_path) == []


def test_a_codebook_of_the_wrong_width_is_refused(hubert: Path, convert: Any, tmp_path: Path) -> None:
    assert convert(hubert, "--output", tmp_path / "encoder", "--layer", 1).exit_code == 0
    narrow = kmeans(tmp_path / "narrow.bin", 12)
    for words in (("--output", tmp_path / "encoder"), ("--output", tmp_path / "k", "--encoder", tmp_path / "encoder")):
        done = convert(narrow, *words)
        assert done.exit_code == 1
        assert "a k-means of 12 dimensions; the encoder's features have 16" in done.stderr
    assert not (tmp_path / "encoder" / "kmeans.safetensors").exists()
    done = convert(narrow, "--output", tmp_path / "k", "--encoder", tmp_path / "absent")
    assert (done.exit_code, "absent/config.json: no such file" in done.stderr) == (1, True)


def test_nothing_is_overwritten(hubert: Path, convert: Any, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    assert convert(hubert, "--output", target, "--layer", 1).exit_code == 0
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    done = convert(hubert, "--output", target, "--layer", 2)
    assert done.exit_code == 1
    assert "already there" in done.stderr
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("--layer", 3), 2, "the model has layers 1 to 2"),
        ((), 1, "say --layer, 1 to 2"),
        (("--kind", "vocoder"), 1, "--kind vocoder, and its content is hubert"),
        (("--kind", "wav2vec"), 2, "wav2vec"),
        (("--layer", 1, "--config", "c.json"), 2, "--config is for vocoder"),
        (("--layer", 1, "--normalize"), 1, "normalize: False"),
        (("--to", "fairseq"), 1, "wants the directory of a HubertModel"),
    ],
)
def test_wrong_words(words: tuple, code: int, reason: str, hubert: Path, convert: Any, tmp_path: Path) -> None:
    done = convert(hubert, "--output", tmp_path / "out", *words)
    assert done.exit_code == code, done.stderr
    assert reason in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_renamed_file_is_told_by_its_content(convert: Any, tmp_path: Path) -> None:
    file = kmeans(tmp_path / "hubert.pt", 4)
    assert json.loads(convert(file, "--output", tmp_path / "out", "--json").stdout)["kind"] == "kmeans"
    torch.save({"state": torch.ones(1)}, tmp_path / "km.bin")
    done = convert(tmp_path / "km.bin", "--output", tmp_path / "other")
    assert done.exit_code == 1
    assert "it holds: state" in done.stderr


def test_a_vocoder_needs_its_config(convert: Any, tmp_path: Path) -> None:
    torch.save({"generator": {"conv_pre.bias": torch.ones(3)}}, tmp_path / "g_00000010")
    done = convert(tmp_path / "g_00000010", "--output", tmp_path / "vocoder")
    assert done.exit_code == 1
    assert "config.json: no such file; give the vocoder's own with --config" in done.stderr
    (tmp_path / "config.json").write_text("[1]")
    assert "a list, not an object" in convert(tmp_path / "g_00000010", "--output", tmp_path / "v").stderr


def test_an_attack_is_told_and_nothing_written(convert: Any, tmp_path: Path) -> None:
    file = tmp_path / "hubert.pt"
    file.write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/canary'\ntR.".encode())
    done = convert(file, "--output", tmp_path / "encoder")
    assert done.exit_code == 1
    assert "it asks for os.system" in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hubert.pt"]
