"""One spoken question to the shipped bundle, and what noise does to its units."""

from importlib import resources

import numpy as np
import pytest

from speechgpt.evaluation.conversation import Conversation
from speechgpt.evaluation.listening import Listener
from speechgpt.language.config import GenerationSection
from speechgpt.speech import audio
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice

NANO = str(resources.files("speechgpt") / "bundles" / "nano")


@pytest.fixture(scope="module")
def question() -> bytes:
    wave = Voice(VoiceSection(engine="hibari")).say("what is two plus three", 1)
    return audio.encode(wave, "flac")


def test_a_question_waits_for_its_answer(question: bytes) -> None:
    conversation = Conversation(NANO, GenerationSection(temperature=0, max_new_tokens=500, max_text_tokens=60), 1)
    timing = conversation.ask(question)
    assert timing is not None
    assert timing.waited > 0
    assert 0.3 < timing.answer < 10


def test_more_noise_changes_more_units(question: bytes) -> None:
    listener = Listener(NANO, "none")
    edits = [listener.stability({"a": question}, decibels, 1)["a"] for decibels in (60.0, 20.0, -10.0)]
    assert np.all(np.diff(edits) >= 0)
    assert edits[0] < 0.3 < edits[2]
