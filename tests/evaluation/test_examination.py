"""Asking an untrained model: every question gets something back, and the same alone as among others."""

import math
from pathlib import Path

import pytest
import torch

from speechgpt.evaluation.examination import Clip, Examiner
from speechgpt.recipe import load
from speechgpt.training import starting


@pytest.fixture(scope="module")
def examiner(tmp_path_factory: pytest.TempPathFactory) -> Examiner:
    directory: Path = tmp_path_factory.mktemp("model")
    recipe = load("tiny")
    texts = ["what is two plus three", "two plus three is five", "what is the capital of france"]
    starting.write_base(directory, recipe.language, None, texts, torch.zeros(32, 64).normal_(), seed=1)
    short = recipe.generation.model_copy(update={"max_new_tokens": 60, "max_text_tokens": 12, "temperature": 1.0})
    return Examiner(str(directory), None, short)


def clip(number: int, length: int) -> Clip:
    units = tuple((number + step) % 32 for step in range(length))
    return Clip(str(number), "seen", "ann", "what is two plus three", "five", "plus", units)


CLIPS = [clip(number, 10 + 7 * number) for number in range(5)]


def test_everything_asked_is_answered_in_order(examiner):
    assert len(examiner.transcribe(CLIPS)) == len(CLIPS)
    assert len(examiner.answer_typed(CLIPS)) == len(CLIPS)
    for reply in examiner.answer(CLIPS, "chain"):
        assert reply.units is None or all(0 <= unit < 32 for unit in reply.units)


def test_decoding_is_greedy_and_company_changes_nothing(examiner):
    together = examiner.transcribe(CLIPS)
    assert together == [examiner.transcribe([each])[0] for each in CLIPS]


def test_a_clip_beyond_the_context_is_not_understood_and_stops_nobody(examiner):
    endless, empty = clip(7, 3000), clip(8, 0)
    texts = examiner.transcribe([endless, CLIPS[0], empty])
    assert (texts[0], texts[2]) == ("", "")
    assert texts[1] == examiner.transcribe(CLIPS[:1])[0]
    replies = examiner.answer([endless, empty], "text")
    assert all(reply.text is None and not reply.well_formed for reply in replies)


def test_an_untrained_model_guesses_evenly(examiner):
    losses = examiner.unit_losses(CLIPS)
    assert [loss.tokens for loss in losses] == [len(each.units) for each in CLIPS]
    size = examiner.model.model.get_output_embeddings().weight.shape[0]
    perplexity = math.exp(sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses))
    assert perplexity == pytest.approx(size, rel=0.3)


def test_a_clip_s_loss_does_not_depend_on_its_batch(examiner):
    together = examiner.unit_losses(CLIPS)
    for each, loss in zip(CLIPS, together, strict=True):
        assert examiner.unit_losses([each])[0].nats == pytest.approx(loss.nats, rel=1e-4)
