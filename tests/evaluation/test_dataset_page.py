"""The page of a data set stands alone, adds nothing of its own and hides what must not be handed around."""

import re

import numpy as np
import pytest

from speechgpt.evaluation.dataset_page import DatasetFacts, Example, Sound, may_be_shown, render
from speechgpt.language.prompts import Exchange
from speechgpt.speech import audio

HEARD, SPOKEN = (1, 2, 3, 4, 5, 6, 7), (8, 9)


@pytest.fixture(scope="module")
def sound() -> bytes:
    return audio.encode(np.sin(np.arange(8000) * 0.2).astype(np.float32), "flac")


def facts(**changes) -> DatasetFacts:
    report = {
        "rows": {"text": 2, "units": 1200, "s2s": 1},
        "refused": {"question: harmful": 3, "s2s: marker": 1},
        "examples": {"question: harmful": ["bees-1", "bees-2", "bees-3"]},
        "questions": {"bees": {"file": "b", "rows": 7, "chains": 3, "text_only": 1, "refused": {"harmful": 3}}},
        "published": {"old": {"file": "o", "lines": 5, "kept": 4, "refused": 1}},
    }
    values = {
        "title": "tiny",
        "report": report,
        "row_units": {"units": np.arange(1, 1201), "text": np.zeros(2, int), "s2s": np.array([9])},
        "row_words": {"units": np.zeros(1200, int), "text": np.array([5, 9]), "s2s": np.array([30])},
        "categories": {"bees": 1203},
        "seconds": np.full(1200, 3.0),
        "speakers": {"ann": 1000, "bob": 200},
        "unit_counts": np.array([0, 5, 5, 5, 1, 0]),
        "wordings": {"transcribe": 90, "speak": 80},
    }
    return DatasetFacts(**{**values, **changes})


def example(sound: bytes) -> Example:
    turn = Exchange("s2s", "what is <b>honey", "sweet", HEARD, SPOKEN)
    sounds = {HEARD: Sound(sound, "recording"), SPOKEN: Sound(sound, "vocoder")}
    return Example("s2s-1", "s2s", "bees", [Exchange("t2t", "hi", "hello"), turn], (), sounds)


def test_the_page_needs_nothing_from_outside(sound):
    page = render(facts(), [example(sound), Example("units-1", "units", "", (), (1, 2))])
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert links and all(link.startswith(("data:audio/mpeg", "#")) for link in links)
    assert page.count("<audio") == 2 and page.count("<svg") == 4 and "<script" not in page
    assert "the recording" in page and "by the vocoder" in page
    assert "what is &lt;b&gt;honey" in page


def test_its_figures_are_the_reports(sound):
    page = render(facts(hidden=4), [])
    for shown in (
        "1,203",
        "1.0 h",
        "1,200 clips, 2 speakers",
        "90 + 80",
        "4 drawn rows are not shown",
        "bees-1, bees-2",
    ):
        assert shown in page, shown
    assert "2 of them never come" in page
    share = np.array([5, 5, 5, 1]) / 16
    assert f"{-(share * np.log2(share)).sum():.2f} bits a unit" in page
    order = [page.index(f"<td>{kind}</td>") for kind in ("units", "text", "s2s")]
    assert order == sorted(order)


def test_what_is_not_there_leaves_no_heading():
    report = {"rows": {"text": 1}, "refused": {}, "examples": {}}
    nothing = np.zeros(0)
    page = render(facts(report=report, row_units={}, row_words={}, seconds=nothing, unit_counts=np.zeros(3, int)), [])
    for absent in ("Refused</h2>", "Question sets", "Published files", "Codebook", "<svg"):
        assert absent not in page


def test_the_same_facts_give_the_same_page(sound):
    assert render(facts(), [example(sound)]) == render(facts(), [example(sound)])


@pytest.mark.parametrize("text", ["what is bullshit", "write to jane@example.org"])
def test_what_must_not_be_handed_around(text):
    assert not may_be_shown([Exchange("text", "fine", "fine"), Exchange("text", text, "fine")])
    assert not may_be_shown([Exchange("text", "fine", text)])
    assert may_be_shown([Exchange("text", "fine", "fine")])
