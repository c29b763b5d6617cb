"""Real fairseq 0.12.2 builds and saves models; converted, they give its features, units, durations and waveforms."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from speechgpt.interop import fairseq_environment
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.hubert import HubertFeatures
from speechgpt.speech.units import expand
from speechgpt.speech.vocoder import Vocoder

# The first run on a machine also builds fairseq.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("fairseq_models.py")
HUBERTS = ("small-base", "small-large", "small-base-normalized", "small-without-projection", "base")
BACK = ("small-base", "small-large", "small-without-projection")
VOCODERS = (
    *("published", "single", "single-durations", "speakers", "speakers-durations"),
    *("silent-80", "silent-128"),
)
TOLERANCE = 1e-4


def fairseq(*words: str | Path) -> None:
    command = [fairseq_environment.interpreter(), SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=fairseq_environment.environment())
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fairseq")
    fairseq("make", folder)
    return folder


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest, relative to the largest value there is."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_the_environment_is_real_fairseq_and_not_ours() -> None:
    python = fairseq_environment.interpreter()
    code = (
        "import fairseq_on_python_311, fairseq, importlib.util as u;"
        "print(fairseq.__version__, u.find_spec('speechgpt'), fairseq.__file__)"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=fairseq_environment.environment())
    version, ours, file = done.stdout.split()
    assert (version, ours) == ("0.12.2", "None")
    assert Path(file).is_relative_to(python.parents[1])


@pytest.mark.parametrize("name", HUBERTS)
def test_hubert(name: str, made: Path, convert, tmp_path: Path) -> None:
    expected = np.load(made / name / "expected.npz")
    layer = int(expected["layer"])
    waves = [expected[f"clip{i}"] for i in range(sum(key.startswith("clip") for key in expected))]
    asked = () if name == "base" else ("--layer", layer)
    done = convert(made / name / "hubert.pt", "--output", tmp_path / "encoder", *asked, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["layer"], facts["normalize"]) == (layer, bool(expected["normalize"]))
    assert sorted(facts["left_out"]) == ["final_proj.bias", "final_proj.weight", "label_embs_concat"]
    done = convert(made / name / "km.bin", "--output", tmp_path / "encoder")
    assert done.exit_code == 0, done.stderr

    encoder = SpeechEncoder.load(tmp_path / "encoder")
    np.testing.assert_array_equal(encoder.codebook.centroids.numpy(), expected["centroids"])
    features = HubertFeatures.load(tmp_path / "encoder")
    alone = [features([wave])[0].numpy() for wave in waves]
    together = [each.numpy() for each in features(waves)]
    units = [expand(each) for each in encoder.encode(waves)]
    ties = 0
    for index in range(len(waves)):
        theirs = expected[f"features{index}"]
        assert difference(alone[index], theirs) < TOLERANCE
        assert difference(together[index], theirs) < TOLERANCE
        differ = units[index] != expected[f"units{index}"]
        # A frame is a tie where the two nearest centroids are nearer to each other than our features to fairseq's.
        apart = encoder.codebook.margins(torch.from_numpy(theirs)).numpy() > TOLERANCE * np.abs(theirs).max()
        assert not (differ & apart).any()
        ties += int((~apart).sum())
    frames = sum(len(each) for each in units)
    worst = max(difference(alone[i], expected[f"features{i}"]) for i in range(len(waves)))
    print(f"{name}: {frames} frames, largest relative difference {worst:.1e}, {ties} ties")
    assert ties < frames / 10


def test_hubert_and_back(made: Path, convert, tmp_path: Path) -> None:
    """fairseq -> transformers -> fairseq: the same tensors, and fairseq makes the same features of them."""
    for name in BACK:
        encoder, layer = tmp_path / name, int(np.load(made / name / "expected.npz")["layer"])
        assert convert(made / name / "hubert.pt", "--output", encoder, "--layer", layer).exit_code == 0
        done = convert(encoder, "--to", "fairseq", "--output", made / name / "back.pt")
        assert done.exit_code == 0, done.stderr
        back = torch.load(made / name / "back.pt", weights_only=True)["model"]
        original = torch.load(made / name / "weights.pt", weights_only=True)
        kept = {key: value for key, value in original.items() if not key.startswith(("final_proj", "label_embs"))}
        assert kept.keys() == {key for key in back if not key.startswith("final_proj")}
        assert all(torch.equal(value, back[key]) for key, value in kept.items())
    fairseq("again", made)
    for name in BACK:
        again, before = np.load(made / name / "again.npz"), np.load(made / name / "expected.npz")
        assert len(again.files) == 4
        for key in again:
            np.testing.assert_array_equal(again[key], before[key])


@pytest.mark.parametrize("name", VOCODERS)
def test_vocoder(name: str, made: Path, convert, tmp_path: Path) -> None:
    expected = np.load(made / name / "expected.npz")
    done = convert(made / name / "g_00000010", "--output", tmp_path / "vocoder", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    predicts = "durations0" in expected
    speaker = int(expected["speaker"])
    assert facts["durations"] == predicts
    assert bool(facts["speakers"]) == (speaker >= 0)
    vocoder = Vocoder.load(tmp_path / "vocoder")
    codes = [expected[f"code{i}"] for i in range(sum(key.startswith("code") for key in expected))]
    sounds = vocoder.synthesize(codes, None if speaker < 0 else speaker)
    for index, sound in enumerate(sounds):
        theirs = expected[f"wave{index}"]
        assert theirs.std() > 1e-3
        assert np.abs(sound - theirs).max() < TOLERANCE
        if predicts:
            assert vocoder.durations(codes)[index].tolist() == expected[f"durations{index}"].tolist()
    worst = max(np.abs(sound - expected[f"wave{i}"]).max() for i, sound in enumerate(sounds))
    print(f"{name}: largest difference {worst:.1e}")
