"""Putting every form of question to an untrained model: something comes back for each, and the sums hold."""

import math
from pathlib import Path

import pytest
import torch

from speechgpt.evaluation.examination import Clip
from speechgpt.evaluation.interview import NO_ROOM, Interviewer
from speechgpt.evaluation.task_recognition import TASKS
from speechgpt.language.prompts import Exchange
from speechgpt.recipe import load
from speechgpt.training import starting


@pytest.fixture(scope="module")
def interviewer(tmp_path_factory: pytest.TempPathFactory) -> Interviewer:
    directory: Path = tmp_path_factory.mktemp("model")
    recipe = load("tiny")
    texts = ["what is two plus three", "two plus three is five", "what is the capital of france"]
    starting.write_base(directory, recipe.language, None, texts, torch.zeros(32, 64).normal_(), seed=1)
    short = recipe.generation.model_copy(update={"max_new_tokens": 40, "max_text_tokens": 10})
    return Interviewer(str(directory), None, short)


def clip(number: int, length: int, text: str = "what is two plus three") -> Clip:
    units = tuple((number + step) % 32 for step in range(length))
    return Clip(str(number), "seen", "ann", text, "two plus three is five", "plus", units)


CLIPS = [clip(number, 10 + 5 * number) for number in range(3)]
HOPELESS = [clip(7, 3000), clip(8, 0, "")]


@pytest.mark.parametrize("kind", ["s2s", "s2t", "t2s", "t2t", "direct", "standard", "text"])
def test_every_form_is_answered_in_order_and_with_its_own_parts(interviewer, kind):
    replies = interviewer.ask([*CLIPS, HOPELESS[1]], kind)
    assert len(replies) == 4 and replies[3] == NO_ROOM
    assert replies[0] == interviewer.ask(CLIPS[:1], kind)[0], "company changes nothing"
    if kind in ("s2t", "t2t", "text"):
        assert all(reply.units is None for reply in replies)
    if kind == "standard":
        assert all(reply.text is None and reply.transcript is None for reply in replies)


def test_what_fills_the_context_stops_nobody(interviewer):
    replies = interviewer.ask([HOPELESS[0], CLIPS[0]], "s2s")
    assert replies == [NO_ROOM, *interviewer.ask(CLIPS[:1], "s2s")]
    [shape, _] = interviewer.unguided([HOPELESS[0], CLIPS[0]], TASKS[0], 1)
    assert shape == ("nothing", False)


def test_a_cascade_is_the_model_s_own_tasks_one_after_the_other(interviewer):
    [reply] = interviewer.cascade(CLIPS[:1], None, aloud=True)
    heard = interviewer.transcribe(CLIPS[:1])
    assert (reply.transcript or "") == heard[0]
    [told] = interviewer.cascade(CLIPS[:1], ["what is two plus three"], aloud=True)
    [typed] = interviewer.ask(CLIPS[:1], "t2t")
    assert (told.transcript, told.text) == ("what is two plus three", typed.text)
    if told.text:
        assert told.units == interviewer.model.speak([told.text], interviewer.generation)[0]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_without_a_grammar_a_model_may_write_anything(interviewer, task):
    found = interviewer.unguided(CLIPS, task, seed=1)
    assert len(found) == len(CLIPS)


def test_the_free_reply_is_what_the_model_finds_likeliest(interviewer):
    prompt = interviewer.model.prompts.transcription(CLIPS[0].units)
    [generated] = interviewer.model.unguided([prompt], interviewer.generation.model_copy(update={"temperature": 0}))
    ids = interviewer.model.vocabulary.encode_prompt(prompt)
    with torch.inference_mode():
        scores = interviewer.model.model(input_ids=torch.tensor([ids + generated])).logits[0]
    assert generated == scores[len(ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["text", "t2t"])
def test_the_loss_is_of_the_answer_s_words_alone(interviewer, kind):
    model = interviewer.model
    together = interviewer.text_losses([CLIPS[0], clip(5, 9, "what is the capital of france")], kind)
    exchange = Exchange(kind, question=CLIPS[0].text or "", answer=CLIPS[0].answer or "")
    prompt = model.vocabulary.encode_prompt(model.prompts.ask(exchange))
    answer = model.vocabulary.encode_plain(" two plus three is five")
    ids = prompt + ([model.vocabulary.ta] if kind == "t2t" else []) + answer
    with torch.inference_mode():
        scores = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(answer)
    wanted = -sum(float(scores[first + step - 1, token]) for step, token in enumerate(answer))
    assert [loss.tokens for loss in together] == [len(answer)] * 2
    assert together[0].nats == pytest.approx(wanted, rel=1e-3)
    size = model.model.get_output_embeddings().weight.shape[0]
    assert math.exp(wanted / len(answer)) == pytest.approx(size, rel=0.5), "an untrained model guesses evenly"
