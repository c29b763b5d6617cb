"""fairseq's text-to-unit models, made and saved by real fairseq 0.12.2: converted, they compute what it computes."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from speechgpt.interop import checkpoints, fairseq_environment
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.text_to_unit import from_fairseq
from speechgpt.language.text_to_unit import TextToUnit

# The first run on a machine also builds fairseq.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("fairseq_text_to_unit.py")
CLASSES = {"plain": "fsmt", "apart": "fsmt", "before": "m2m_100", "bart": "bart", "normed": "bart", "mbart": "mbart"}
SENTENCES = ["the bees make honey", "what is the sea", "a bee", "honey is sweet, and the sea is not: zebra"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text2unit")
    command = [fairseq_environment.interpreter(), SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=fairseq_environment.environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_it_computes_what_fairseq_computes(name: str, made: Path, convert, tmp_path: Path) -> None:
    done = convert(made / name / "text2unit.pt", "--output", tmp_path / "model", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["kind"], facts["units"], facts["class"]) == ("text-to-unit", 50, CLASSES[name])
    maker = TextToUnit.load(tmp_path / "model")
    assert maker.unit_ids == tuple(range(6, 56))
    expected, logits = json.loads((made / name / "expected.json").read_text()), np.load(made / name / "logits.npz")
    worst = 0.0
    for number, (sentence, theirs) in enumerate(zip(SENTENCES, expected, strict=True)):
        assert maker.source(sentence) == theirs["source"]
        source, given = torch.tensor([theirs["source"]]), torch.tensor([theirs["given"]])
        with torch.inference_mode():
            ours = maker.model(input_ids=source, decoder_input_ids=given, use_cache=False).logits[0].numpy()
            # fairseq's search never pads and gives one token at least.
            greedy = maker.model.generate(
                source,
                num_beams=1,
                do_sample=False,
                min_new_tokens=1,
                max_new_tokens=31,
                suppress_tokens=[1],
                decoder_start_token_id=2,
                eos_token_id=2,
            )[0].tolist()
        scores = logits[f"logits{number}"]
        worst = max(worst, float(np.abs(ours - scores).max() / np.abs(scores).max()))
        *said, _ = theirs["greedy"]
        assert greedy[1 : len(said) + 1] == said
    assert worst < 1e-4
    print(f"{name}: largest relative difference {worst:.1e}")
    alone, together = [maker.write([text])[0] for text in SENTENCES], maker.write(SENTENCES)
    assert alone == together
    for units in filter(None, together):
        assert max(units) < 50 and all(a != b for a, b in zip(units, units[1:], strict=False))


def test_files_that_do_not_belong_together_are_refused(made: Path, convert, tmp_path: Path) -> None:
    shutil.copytree(made / "plain", tmp_path / "plain")
    dictionary = tmp_path / "plain" / "binary" / "dict.unit.txt"
    whole = dictionary.read_text()
    dictionary.write_text(whole.removesuffix("\n").rpartition("\n")[0] + "\n")
    done = convert(tmp_path / "plain" / "text2unit.pt", "--output", tmp_path / "model")
    assert done.exit_code == 1 and "do not belong together" in done.stderr
    dictionary.write_text(whole.replace("<7> 1\n", "<77> 1\n"))
    done = convert(tmp_path / "plain" / "text2unit.pt", "--output", tmp_path / "model")
    assert done.exit_code == 1 and "50 units, and not <0> to <49>" in done.stderr
    dictionary.unlink()
    done = convert(tmp_path / "plain" / "text2unit.pt", "--output", tmp_path / "model")
    assert done.exit_code == 1 and "dict.unit.txt: no such file; --dictionaries names" in done.stderr
    assert not (tmp_path / "model").exists()
    done = convert(
        tmp_path / "plain" / "text2unit.pt", "--output", tmp_path / "m", "--dictionaries", made / "plain/binary"
    )
    assert done.exit_code == 0, done.stderr


def test_kinds_that_are_not_here_are_named(made: Path) -> None:
    content = checkpoints.read(made / "plain" / "text2unit.pt")
    binary = made / "plain" / "binary"
    for name, value, complaint in [
        ("decoder_normalize_before", True, "normalise at different places"),
        ("no_token_positional_embeddings", True, "a model of that kind is not here"),
    ]:
        settings = {**vars_of(content), name: value}
        with pytest.raises(ConversionError, match=complaint):
            from_fairseq({**content, "cfg": {"model": settings, "task": {}}}, "x.pt", binary)
    cut = {key: value for key, value in content["model"].items() if "layers.1.fc2.bias" not in key}
    with pytest.raises(ConversionError, match=r"places without weights: \['model\.decoder\.layers\.1\.fc2\.bias'"):
        from_fairseq({**content, "model": cut}, "x.pt", binary)


def vars_of(content: dict) -> dict:
    return checkpoints.plain(content["cfg"])["model"]
