"""`speechgpt convert` of whole model directories."""

import json
from pathlib import Path

from safetensors.numpy import load_file


def test_a_speechgpt_and_its_adapter_become_directories_of_ours(convert, published, tmp_path: Path) -> None:
    said = convert(published.cm, "--output", tmp_path / "language", "--json")
    assert said.exit_code == 0, said.stderr
    facts = json.loads(said.stdout)
    assert (facts["kind"], facts["units"]) == ("language", 1000)
    assert set(facts["files"]) == {file.name for file in (tmp_path / "language").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "unit_vocabulary.json"} <= set(facts["files"])
    said = convert(published.com, "--output", tmp_path / "adapter")
    assert said.exit_code == 0, said.stderr
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_what_a_directory_is_may_not_be_contradicted(convert, published, tmp_path: Path) -> None:
    said = convert(published.cm, "--output", tmp_path / "out", "--kind", "adapter")
    assert said.exit_code == 1 and "--kind adapter, and it holds a language" in said.stderr
    (tmp_path / "empty").mkdir()
    said = convert(tmp_path / "empty", "--output", tmp_path / "out")
    assert said.exit_code == 1 and "neither a model's config.json nor an adapter_config.json" in said.stderr
    said = convert(published.cm, "--output", tmp_path / "out", "--layer", "3")
    assert said.exit_code == 2
    assert not (tmp_path / "out").exists()
