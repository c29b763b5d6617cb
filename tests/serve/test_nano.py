"""The bundle that everybody meets first: it opens by its name, hears, knows, says what it does not know, and speaks."""

import asyncio

import numpy as np
import pytest

from serve.encoder import Heard
from serve.pipeline import OwnPipeline
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.normaliser import spoken
from speechgpt.language.prompts import Turn
from speechgpt.language.world import load as load_world
from speechgpt.recipe import load
from speechgpt.runtime import bundle
from speechgpt.speech.audio import encode
from speechgpt.speech.config import VoiceSection
from speechgpt.speech.voices import Voice

NANO = load("nano")


@pytest.fixture(scope="module")
def opened() -> bundle.Bundle:
    return bundle.load("nano")


def test_it_hears_a_question_and_answers_it_aloud(opened: bundle.Bundle) -> None:
    pipeline = OwnPipeline(opened.directory, NANO.serving)
    question = Voice(VoiceSection(engine="espeak", voice="en-us+f2")).say("what is two plus three", 0)
    heard = asyncio.run(pipeline.hear(encode(question, "wav")))
    assert isinstance(heard, Heard)
    model = SpeechLanguageModel.load(str(opened.directory / "language"), None)
    [reply] = model.answer([[Turn("user", units=heard.units)]], "chain", NANO.generation)
    assert reply.well_formed
    assert (reply.transcript, reply.text) == ("what is two plus three", "two plus three is five")
    assert reply.units and len(reply.units) > 10


def test_it_does_not_answer_noise(opened: bundle.Bundle) -> None:
    pipeline = OwnPipeline(opened.directory, NANO.serving)
    noise = np.random.default_rng(0).normal(0, 0.05, 32_000).astype(np.float32)
    refused = asyncio.run(pipeline.hear(encode(noise, "wav")))
    assert not isinstance(refused, Heard) and refused.reason == "no_speech"


def test_it_reads_what_people_write(opened: bundle.Bundle) -> None:
    model = SpeechLanguageModel.load(str(opened.directory / "language"), None)
    asked = ("What is the capital of France?", "What's 2 + 3?")
    replies = model.answer([[Turn("user", text=text)] for text in asked], "text", NANO.generation)
    assert [reply.text for reply in replies] == ["the capital of france is paris", "two plus three is five"]


def test_what_its_world_says_is_in_the_form_that_it_reads() -> None:
    world = load_world(NANO.world, NANO.seed)
    asked = [*world.questions(), *world.outside()]
    texts = {text for question in asked for text in (question.question, question.answer)}
    assert {spoken(text) for text in texts} == texts


def test_it_takes_little_room(opened: bundle.Bundle) -> None:
    assert sum(file.stat().st_size for file in opened.directory.rglob("*") if file.is_file()) < 40e6
