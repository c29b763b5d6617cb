import numpy as np
import pytest

from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.training.targets import encode


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.grow(train_tokenizer(["what is two plus two", "it is four"] * 9, 300), 16, "whole")


CHAIN = "[Human]: <sosp><1><2><eosp><eoh>. [SpeechGPT]: [tq] two; [ta] four; [ua] <sosp><3><eosp><eoa>."


def learnt(vocabulary: Vocabulary, text: str, prefix: str = "", **settings) -> str:
    ids, weights = encode(vocabulary, prefix, text, **{"loss_on": "all", "unit_weight": 1.0, **settings})
    return vocabulary.decode(ids[weights > 0].tolist())


def test_the_prefix_alone_is_masked_by_default(vocabulary):
    ids, weights = encode(vocabulary, "you are it is.\n", CHAIN, "all", 1.0)
    masked = len(vocabulary.encode_row("you are it is.\n", CHAIN).ids) - len(vocabulary.encode_row("", CHAIN).ids) + 1
    assert (weights[:masked] == 0).all() and (weights[masked:] == 1).all()
    assert ids[0] == vocabulary.bos and ids[-1] == vocabulary.eos


def test_reply_masks_the_users_turn(vocabulary):
    assert "<1>" not in learnt(vocabulary, CHAIN, loss_on="reply")
    assert "[tq]" in learnt(vocabulary, CHAIN, loss_on="reply")


def test_reply_learns_every_answer_of_a_dialogue(vocabulary):
    turn = "[Human]: {}<eoh>. [SpeechGPT]: {}<eoa>."
    got = learnt(vocabulary, " ".join([turn.format("what", "four"), turn.format("plus", "two")]), loss_on="reply")
    assert "four" in got and "two" in got
    assert "what" not in got and "plus" not in got


def test_rows_without_turns_are_learnt_whole(vocabulary):
    assert learnt(vocabulary, "<sosp><1><2><eosp>", loss_on="reply") == "<sosp><1><2><eosp>"


def test_units_weigh_what_the_stage_says(vocabulary):
    ids, weights = encode(vocabulary, "", CHAIN, "all", 0.25)
    units = np.array([vocabulary.is_unit(token) for token in ids])
    assert set(weights[units].tolist()) == {0.25}
    assert set(weights[~units][1:].tolist()) == {1.0}
