"""From answers and verdicts to figures: every answer is a row, every row is counted once."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from speechgpt.evaluation import instruction_following as following
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.instruction_following import MODEL, STANDARD_MODEL, Asking
from speechgpt.evaluation.judge import Rules, Verdict
from speechgpt.evaluation.metrics import Bootstrap
from speechgpt.language.answers import Answer

PLAIN = Bootstrap(0)
WHOLE = InstructionFollowingSection(standard="other")


def clip(name: str, text: str | None = None, answer: str | None = "five", category: str = "plus") -> Clip:
    return Clip(name, "stranger", "joe", text if text is not None else f"question {name}", answer, category, (1, 2))


def said(text: str | None, units: list[int] | None = None, well_formed: bool = True) -> Answer:
    return Answer("heard so", text, units, well_formed, "stop")


def by_rules(item):
    [verdict] = Rules().score([item])
    return verdict


def test_everything_is_asked_once():
    asked = following.askings(WHOLE)
    assert len(set(asked)) == len(asked)
    assert Counter(asking.system for asking in asked) == {
        MODEL: 6,
        "cascade": 3,
        "cascade with a recogniser": 2,
        STANDARD_MODEL: 2,
    }
    assert len({asking.name for asking in asked}) == len(asked)


def test_one_form_alone_asks_for_no_other():
    section = InstructionFollowingSection(forms=("t2t",), ablation=False, standard="other")
    assert following.askings(section) == [Asking(MODEL, "t2t")]
    ablated = InstructionFollowingSection(forms=("t2t",), cascade=())
    assert [asking.kind for asking in following.askings(ablated)] == ["t2t", "s2s", "direct", "standard"]


def test_no_question_is_asked_twice_and_categories_come_evenly():
    spoken = [
        clip(f"{word}-{voice}", text=word, category=category)
        for category, words in {"plus": "abcdef", "day": "gh"}.items()
        for word in words
        for voice in ("joe", "rp")
    ]
    drawn = following.chosen(spoken, 4, seed=1)
    assert len({each.text for each in drawn}) == 4
    assert Counter(each.category for each in drawn) == {"plus": 2, "day": 2}
    assert drawn == following.chosen(spoken[::-1], 4, seed=1)
    assert {each.speaker for each in drawn} == {"joe"} and len(following.chosen(spoken, 100, seed=1)) == 8
    assert len({each.id.split("-")[1] for each in following.chosen(spoken, 100, seed=1)}) == 2, "both voices ask"


def test_a_spoken_answer_is_what_is_heard_of_it_and_its_text_counts_apart():
    [row] = following.rows(Asking(MODEL, "s2s"), [clip("a")], {"a": said("five", [3])}, {"a": "nine"}, by_rules)
    assert (row.score, row.text_score, row.heard, row.units) == (1, 5, "nine", 1)
    [text] = following.rows(Asking(MODEL, "s2t"), [clip("a")], {"a": said("five")}, {"a": "nine"}, by_rules)
    assert (text.score, text.text_score, text.heard) == (5, None, None)


def test_silence_scores_one_and_without_a_recogniser_there_is_no_score():
    answers = {"a": said("five", None, well_formed=False)}
    [silent] = following.rows(Asking(MODEL, "s2s"), [clip("a")], answers, {}, by_rules)
    assert (silent.score, silent.heard) == (1, None)
    [unheard] = following.rows(Asking(MODEL, "s2s"), [clip("a")], {"a": said("five", [3])}, None, by_rules)
    assert (unheard.score, unheard.why, unheard.text_score) == (None, "unheard", 5)


def test_speech_alone_has_no_text_to_score():
    answers = {"a": Answer(None, None, [3], True, "stop")}
    [row] = following.rows(Asking(MODEL, "standard"), [clip("a")], answers, {"a": "five"}, by_rules)
    assert (row.score, row.text_score, row.text) == (5, None, None)


VERDICTS = [*map(Verdict, range(1, 6)), Verdict(None, "unreadable"), Verdict(None, "unknown")]


@settings(max_examples=25)
@given(count=st.integers(1, 5), draw=st.randoms(use_true_random=False))
def test_counts_add_up_and_every_row_comes_once(count, draw):
    clips = [clip(f"c{number}", category=f"k{number % 2}") for number in range(count)]
    rows = []
    for asking in following.askings(WHOLE):
        answers = {each.id: said(draw.choice(["five", None]), [1]) for each in clips}
        heard = {each.id: "five" for each in clips} if draw.random() < 0.5 else None
        rows += following.rows(asking, clips, answers, heard, lambda item: draw.choice(VERDICTS))
    written = following.table(rows)
    keys = [(row["system"], row["kind"], row["id"]) for row in written]
    assert len(set(keys)) == len(keys) == len(following.askings(WHOLE)) * len(clips)
    figures = following.figures(rows, WHOLE, PLAIN)
    assert figures["rows"] == len(rows)
    tallies = [(form, name, t) for form, of in figures["forms"].items() for name, t in of.items()]
    tallies += [(kind, MODEL, t) for kind, t in figures["ablation"]["chain"].items() if kind != "s2s"]
    tallies += [(kind, STANDARD_MODEL, t) for kind, t in figures["ablation"]["standard"].items() if t]
    assert sum(counted["asked"] for *_, counted in tallies) == len(rows)
    for kind, system, counted in tallies:
        own = [row for row in rows if (row.system, row.kind) == (system, kind)]
        assert counted["asked"] == len(own)
        assert counted["scored"] + counted["unreadable"] + counted["unknown"] + counted["unheard"] == len(own)
        assert sum(counted["given"].values()) == counted["scored"]
        scores = [row.score for row in own if row.score is not None]
        assert (counted["score"] or {}).get("value") == (pytest.approx(sum(scores) / len(scores)) if scores else None)
    assert figures["ablation"]["chain"]["s2s"] == {
        key: value for key, value in figures["forms"]["s2s"][MODEL].items() if key != "model_is_better_by"
    }


def test_the_model_is_better_on_the_questions_that_both_were_scored_on():
    clips = [clip("a"), clip("b"), clip("c")]
    chain = following.rows(
        Asking(MODEL, "s2t"), clips, {name: said("five") for name in "abc"}, None, lambda item: Verdict(5)
    )
    other = [replace(row, system="cascade", score=score) for row, score in zip(chain, (3, None, 4), strict=True)]
    assert following.advantage(chain, other, PLAIN) == {"value": 1.5, "low": 1.5, "high": 1.5, "count": 2}
    section = InstructionFollowingSection(forms=("s2t",), ablation=False)
    figures = following.figures([*chain, *other], section, PLAIN)
    assert figures["forms"]["s2t"]["cascade"]["model_is_better_by"]["value"] == 1.5
    assert figures["ablation"] is None


def test_retention_is_of_the_right_answers_and_its_own():
    losses = {kind: [UnitLoss(0.0, 2), UnitLoss(0.0, 1)] for kind in following.RETAINED}
    kept = following.retention(
        [clip("a"), clip("b")], losses, {"text": ["Five.", None], "t2t": ["five", "five"]}, PLAIN
    )
    assert kept["text"]["perplexity"]["value"] == 1 and kept["text"]["right"]["value"] == 0.5
    assert kept["t2t"]["right"]["value"] == 1 and kept["t2t"]["asked"] == 2


def test_headlines_are_numbers_or_null():
    rows = following.rows(Asking(MODEL, "s2s"), [clip("a")], {"a": said("five", [1])}, None, by_rules)
    section = InstructionFollowingSection(forms=("s2s",))
    figures = following.figures(rows, section, PLAIN) | {
        "questions": 1,
        "task_recognition": None,
        "retention": {"base": following.retention([], {"text": [], "t2t": []}, {"text": [], "t2t": []}, PLAIN)},
    }
    shown = following.headlines(figures)
    assert shown["score"]["s2s"] == {MODEL: None}
    assert shown["ablation"] == {"chain": {"s2s": None, "direct": None, "standard": None}} | {
        "standard": {"s2s": None, "direct": None, "standard": None}
    }
    assert json.loads(json.dumps(shown)) == shown


def test_a_form_is_named_once():
    with pytest.raises(ValidationError, match="each can be named once; these are s2s, s2s"):
        InstructionFollowingSection(forms=("s2s", "s2s"))
