"""The page stands alone, shows what was measured, and says what was not."""

import re

import numpy as np
import pytest

from speechgpt.evaluation import instruction_following as following
from speechgpt.evaluation import task_recognition
from speechgpt.evaluation.config import InstructionFollowingSection
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.instruction_page import Sample, render, tables
from speechgpt.evaluation.judge import Verdict
from speechgpt.evaluation.metrics import Bootstrap
from speechgpt.evaluation.task_recognition import Done
from speechgpt.language.answers import Answer
from speechgpt.speech import audio

CLIPS = [Clip(name, "stranger", "joe", "two plus <b>three", "five", "plus", (1, 2)) for name in "ab"]


@pytest.fixture(scope="module")
def rows() -> list[following.Row]:
    section = InstructionFollowingSection()
    answers = {clip.id: Answer("two plus three", "<i>five", [1], True, "stop") for clip in CLIPS}
    heard = {clip.id: "5" for clip in CLIPS}
    made = []
    for asking in following.askings(section):
        made += following.rows(asking, CLIPS, answers, heard, lambda item: Verdict(4))
    return made


@pytest.fixture(scope="module")
def figures(rows: list[following.Row]) -> dict:
    losses = {kind: [UnitLoss(2.0, 2)] * 2 for kind in following.RETAINED}
    replies = {kind: ["five", "six"] for kind in following.RETAINED}
    return {
        "questions": 2,
        "judge": "rules",
        "recogniser": "whisper-tiny",
        **following.figures(rows, InstructionFollowingSection(), Bootstrap(20)),
        "all_categories": ["plus"],
        "task_recognition": task_recognition.figures("released", {"speak": [Done("speech", True)]}, Bootstrap(0)),
        "retention": {"base": following.retention(CLIPS, losses, replies, Bootstrap(0))},
        "notes": ["Nobody was <asked>."],
        "unusable": ["c: silent: nothing <u>there"],
        "files": {"rows": "reports/instruction_following.parquet"},
    }


def test_the_page_needs_nothing_from_outside_and_runs_no_words(rows, figures):
    sound = audio.encode(np.sin(np.arange(8000) * 0.2).astype(np.float32), "flac")
    page = render(figures, [Sample(rows[0], sound, sound), Sample(rows[1], sound, None)], "tiny")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert page.count("<audio") == 3 and page.count("<svg") == 1 and "<script" not in page
    for words in ("two plus &lt;b&gt;three", "&lt;i&gt;five", "Nobody was &lt;asked&gt;", "nothing &lt;u&gt;there"):
        assert words in page


def test_what_was_not_measured_is_said(figures):
    page = render(figures, [], "tiny")
    trained = page[page.index("speech alone</td>") :][:200]
    assert "–" in trained and "not measured" in trained
    bare = {**figures, "task_recognition": None, "retention": {}, "ablation": None, "recogniser": None}
    page = render(bare, [], "tiny")
    assert "No recogniser listened" in page
    assert "grammar" not in page and "What stays in text" not in page and "trained for" not in page


def test_the_terminal_shows_forms_and_ablation(figures):
    shown = tables(figures)
    assert [table.row_count for table in shown] == [4 + 3 + 2, 2]
    assert len(tables({**figures, "ablation": None})) == 1
