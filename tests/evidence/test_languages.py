"""An encoder, a codebook and a vocoder from recordings of a language and nothing else, by the recipe `recordings`.

The recordings are prompts of telephone systems, 23 to 30 minutes of one voice each, without transcripts, which Debian
packages carry: apt-get install asterisk-core-sounds-es-g722 asterisk-core-sounds-fr-g722 asterisk-core-sounds-it-g722
(CC BY-SA 3.0 and CC BY 3.0; nothing of them is kept).
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechgpt.evaluation.metrics import word_errors
from speechgpt.evaluation.quality import raters
from speechgpt.evaluation.recogniser import open_recogniser
from speechgpt.speech import audio
from speechgpt.speech.encoder import SpeechEncoder
from speechgpt.speech.vocoder import Vocoder

SOUNDS = Path("/usr/share/asterisk/sounds")
JOBS = ("manifest", "synthesize", "train-encoder", "fit-units", "tokenize", "train-vocoder")
ONE_IN = 12
"""Of the prompts is held out."""
SHORTEST = 1.5
"""Seconds of a prompt whose words are counted."""
WHISPER = ()
HUBERT = (
    "encoder.training.objective=masked",
    "encoder.training.teacher={kind: mfcc, clusters: 100, frames: 60000}",
    "encoder.training.augment=0",
)

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(5400)]


def prompts(language: str) -> dict[str, np.ndarray]:
    """Every prompt's sound by its name, 16 kHz."""
    import av

    found = {}
    roots = list(SOUNDS.glob(f"{language}_*"))
    if not roots:
        pytest.skip(f"needs apt-get install asterisk-core-sounds-{language}-g722")
    for file in sorted(roots[0].rglob("*.g722")):
        if "silence" not in file.parts:
            with av.open(str(file), format="g722") as opened:
                pieces = [frame.to_ndarray().ravel() for frame in opened.decode(audio=0)]
            found["-".join(file.relative_to(roots[0]).with_suffix("").parts)] = np.concatenate(pieces)
    return found


@pytest.mark.parametrize(
    ("language", "ear"),
    [("es", WHISPER), ("fr", WHISPER), ("it", WHISPER), ("es", HUBERT)],
    ids=["es", "fr", "it", "es-masked"],
)
def test_recordings_alone_become_units_that_speak(
    language: str, ear: tuple[str, ...], tmp_path: Path, record_property: Any
) -> None:
    """From half an hour of recordings alone come an encoder, a codebook and a vocoder whose speech is understood."""
    held_out = {}
    for name, wave in prompts(language).items():
        kept = int(hashlib.sha256(name.encode()).hexdigest(), 16) % ONE_IN == 0
        folder = tmp_path / ("heldout" if kept else "train")
        folder.mkdir(exist_ok=True)
        soundfile.write(folder / f"{name}.wav", wave, audio.SAMPLE_RATE)
        if kept and len(wave) > SHORTEST * audio.SAMPLE_RATE:
            held_out[name] = audio.decode(folder / f"{name}.wav")
    place = tmp_path / "work"
    source = "{{layout: folder, uri: {}, speaker: prompts, language: {}, split: {}}}"
    corpora = ", ".join(source.format(tmp_path / split, language, split) for split in ("train", "heldout"))
    chosen = (f"corpora.sources=[{corpora}]", "vocoder.recorded=[prompts]", *ear)
    for job in JOBS:
        began = time.monotonic()
        options = ["--recipe", "recordings", "--workspace", str(place), "--json"]
        settings = [word for setting in chosen for word in ("--set", setting)]
        command = [sys.executable, "-m", "speechgpt.cli", job, *options, *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{job}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        record_property(f"{job}, seconds", round(time.monotonic() - began))
        for name, value in json.loads(done.stdout.strip().splitlines()[-1])["figures"].items():
            if name in ("recorded_seconds", "frame_accuracy", "hidden_accuracy", "dead_units", "mel"):
                record_property(name, value)

    encoder, vocoder = SpeechEncoder.load(place / "encoder"), Vocoder.load(place / "vocoder")
    waves = list(held_out.values())
    units = [clip.units.tolist() for clip in encoder.encode(waves)]
    spoken = vocoder.synthesize(units)
    seconds = [sum(len(wave) for wave in sounds) / audio.SAMPLE_RATE for sounds in (waves, spoken)]
    record_property("held-out prompts", len(waves))
    record_property("length of what is spoken, of the recordings'", round(seconds[1] / seconds[0], 3))
    recogniser = open_recogniser("whisper-base", language=language)
    assert recogniser is not None
    heard, again = (recogniser.transcribe(sounds) for sounds in (waves, spoken))
    # What somebody hears who hears nothing: the words of another prompt.
    error, nothing = word_error(heard, again), word_error(heard, again[1:] + again[:1])
    record_property("word errors of what is spoken, against the recordings as recognised", round(error, 3))
    record_property("the same, against another prompt", round(nothing, 3))
    for name, rater in raters().items():
        rated = [round(float(np.mean(rater.rate(sounds))), 2) for sounds in (waves, spoken)]
        record_property(f"{name}, recordings and spoken", rated)
    assert 0.9 < seconds[1] / seconds[0] < 1.1
    assert error < 0.7 * nothing, "half an hour makes no good voice, but words come through"


def word_error(wanted: list[str], found: list[str]) -> float:
    counted = [word_errors(a, b) for a, b in zip(wanted, found, strict=True)]
    return sum(errors for errors, _ in counted) / sum(count for _, count in counted)
