import json
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jobs.shell import Context, JobError
from jobs.spoken_samples import SpokenSamples, log_samples
from jobs.train_vocoder import speakers
from speechgpt import recipe as recipes
from speechgpt.runtime.progress import Progress
from speechgpt.runtime.tracking import Tracking
from speechgpt.runtime.workspace import Workspace


@pytest.fixture
def context(run_directory):
    workspace = Workspace(run_directory)
    tracking = Tracking.open(recipes.load("nano").tracking, workspace, "nano")
    with tracking.run("train-chain") as run:
        yield Context(recipes.load("nano"), workspace, Progress(silent=True), run)


def artifacts(context: Context, folder: str) -> dict[str, bytes]:
    from mlflow import MlflowClient

    client = MlflowClient(context.run.uri)
    names = [file.path for file in client.list_artifacts(context.run.id, folder)]
    files = [Path(client.download_artifacts(context.run.id, name)) for name in names]
    return {file.name: file.read_bytes() for file in files}


def test_samples_are_heard_and_read(context):
    sound = 0.1 * np.sin(np.arange(16_000) / 20).astype(np.float32)
    log_samples(context, 300, [{"kind": "s2s", "transcript": "a <b>", "units": [1]}, {"kind": "t2t"}], [sound, None])
    files = artifacts(context, "samples/step-0000300")
    assert set(files) == {"0.wav", "answers.json", "index.html"}
    wave, rate = soundfile.read(BytesIO(files["0.wav"]))
    assert (len(wave), rate) == (16_000, 16_000) and abs(wave).max() == pytest.approx(0.1, abs=0.01)
    assert json.loads(files["answers.json"])[0]["transcript"] == "a <b>"
    page = files["index.html"].decode()
    assert page.count("<audio") == 1 and "a &lt;b&gt;" in page


def test_answers_are_spoken_by_the_vocoder_that_the_run_would_start_from(context):
    shipped = resources.files("speechgpt") / "bundles" / "nano" / "encoder"
    for file in shipped.iterdir():
        context.workspace.write_bytes(f"encoder/{file.name}", file.read_bytes())
    SpokenSamples(context).log(
        0, [{"kind": "s2s", "text": "yes", "units": [3, 4, 5, 6] * 5}, {"kind": "t2t", "units": None}]
    )
    files = artifacts(context, "samples/step-0000000")
    assert "0.wav" in files and "1.wav" not in files
    assert len(files["0.wav"]) > 20 * 640


def test_speakers_are_the_answer_voice_and_the_next():
    recipe = recipes.load("nano")
    assert speakers(recipe) == ["answer"]
    several = recipes.load("nano", ("vocoder.generator={speakers: 3, embedding_dim: 128, model_in_dim: 256}",))
    assert speakers(several) == ["answer", "american", "british"]
    with pytest.raises(JobError, match="9 speakers, but voices.questions has 7"):
        speakers(recipes.load("nano", ("vocoder.generator={speakers: 9, embedding_dim: 128, model_in_dim: 256}",)))
