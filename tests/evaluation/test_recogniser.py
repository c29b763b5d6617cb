"""The packaged recogniser on the real recordings that ship with the package."""

from importlib import resources

import numpy as np
import pytest

from speechgpt.evaluation.metrics import Bootstrap, word_error_rate
from speechgpt.evaluation.recogniser import Recogniser, open_recogniser
from speechgpt.runtime.recordings import read_manifests
from speechgpt.speech import audio


@pytest.fixture(scope="module")
def tiny() -> Recogniser:
    recogniser = open_recogniser("whisper-tiny")
    assert recogniser is not None
    return recogniser


@pytest.fixture(scope="module")
def spoken() -> tuple[list[np.ndarray], list[str]]:
    """Eight recordings of different length, and what is said in them."""
    manifest = resources.files("speechgpt").joinpath("recordings", "manifest.jsonl")
    rows = [row for row in read_manifests([str(manifest)]).rows if row["text"]][:8]
    return [audio.decode(row["path"]) for row in rows], [row["text"] for row in rows]


def test_real_speech_is_written_down(tiny, spoken):
    waves, texts = spoken
    score = word_error_rate(texts, tiny.transcribe(waves), Bootstrap(0))
    assert score is not None and score.value < 0.15


def test_a_clip_is_heard_the_same_alone_and_among_others(tiny, spoken):
    waves, _ = spoken
    assert [tiny.transcribe([wave])[0] for wave in waves[:3]] == tiny.transcribe(waves[:3])


def test_silence_and_nothing_are_not_imagined_into_words(tiny):
    assert tiny.transcribe([np.zeros(16000, np.float32), np.zeros(0, np.float32)]) == ["", ""]
    assert tiny.transcribe([]) == []


def test_a_short_clip_is_not_repeated_over_and_over(tiny, spoken):
    waves, texts = spoken
    shortest = min(range(len(waves)), key=lambda i: len(waves[i]))
    (heard,) = tiny.transcribe([waves[shortest]])
    assert len(heard.split()) <= 2 * len(texts[shortest].split())


def test_none_is_no_recogniser_and_other_names_say_what_is_possible(tmp_path):
    assert open_recogniser("none") is None
    with pytest.raises(FileNotFoundError, match=r"evaluation.recogniser.*whisper-tiny"):
        open_recogniser(str(tmp_path))
