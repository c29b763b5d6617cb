"""The report stands alone: one file, nothing fetched, what was measured and what was not."""

import re

import numpy as np
import pytest

from speechgpt.evaluation import scoring
from speechgpt.evaluation.conversation import Timing
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.metrics import Bootstrap
from speechgpt.evaluation.report import Sample, render
from speechgpt.language.answers import Answer
from speechgpt.speech import audio


def clip(number: int, group: str = "seen", category: str = "plus") -> Clip:
    return Clip(f"c{number}", group, "ann", "two plus <b>three", "five", category, (1, 2, 3))


def reply(text: str) -> Answer:
    return Answer("two plus three", text, [1, 2], True, "stop")


@pytest.fixture(scope="module")
def sound() -> bytes:
    return audio.encode(np.sin(np.arange(8000) * 0.2).astype(np.float32), "flac")


@pytest.fixture(scope="module")
def figures() -> dict:
    clips = [clip(1), clip(2), clip(3, "stranger", "outside")]
    examined = scoring.Examined(
        transcripts={"c1": "two plus b three", "c2": "two b three", "c3": ""},
        replies={"c1": reply("five"), "c2": reply("six"), "c3": reply("five")},
        typed={"c1": "five"},
        losses={"c1": UnitLoss(6.0, 3)},
    )
    measured = scoring.figures(clips, examined, scoring.Heard(answers={"c1": "5", "c2": "sicks"}), Bootstrap(50))
    measured["detail"] |= {
        "stages": {"base": scoring.stage_figures(clips[:2], examined, Bootstrap(50))},
        "recogniser": "whisper-tiny",
        "unusable": ["c9: silent: nothing <i>there"],
    }
    return measured


def test_the_page_needs_nothing_from_outside(figures, sound):
    page = render(
        figures, [Sample(clip(1), reply("five"), "5", sound, sound, None)], "tiny", {"base": [(1, 3.0), (2, 2.5)]}
    )
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert page.count("<audio") == 2
    assert page.count("<svg") == 2
    assert "<script" not in page


def test_words_of_data_are_shown_not_run(figures, sound):
    page = render(figures, [Sample(clip(1), reply("five"), "5", sound, None, None)], "tiny", {})
    assert "two plus &lt;b&gt;three" in page
    assert "nothing &lt;i&gt;there" in page


def test_what_was_not_measured_is_said_not_invented(figures):
    page = render(figures, [], "tiny", {})
    assert figures["resynthesis_wer"] is None
    card = page[page.index("Resynthesis WER") :][:120]
    assert "–" in card and "not measured" in card


def test_the_same_figures_give_the_same_page(figures):
    curves = {"base": [(1, 3.0), (2, 2.5)]}
    assert render(figures, [], "tiny", curves) == render(figures, [], "tiny", curves)


def test_answers_beside_the_voice_and_their_wait_are_shown(figures):
    examined = scoring.Examined(replies={"c1": reply("five")})
    heard = scoring.Heard(answers={"c1": "five"}, said={"c1": "five"})
    opinions = {who: {"dnsmos": {"c1": 3.25}, "distillmos": {"c1": 4.125}} for who in ("model", "voice")}
    more = {
        "answers_aloud": scoring.beside_the_voice(examined, heard, opinions, Bootstrap(0)),
        "alone": {**scoring.waiting([Timing(0.75, 1.5)], Bootstrap(0)), "cores": 2},
        "unit_edits_in_noise": scoring.mean({"c1": 0.375}, Bootstrap(0)),
    }
    page = render({**figures, "detail": {**figures["detail"], **more}}, [], "tiny", {})
    for shown in ("DNSMOS", "3.250", "DistillMOS", "4.125", "0.750 s", "0.375"):
        assert shown in page
