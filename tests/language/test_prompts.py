"""Both dialects, letter for letter, and back."""

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.language.config import LanguageSection
from speechgpt.language.prompts import (
    META,
    Exchange,
    Kind,
    PromptFormat,
    Turn,
    descriptions,
    kind_of,
    read_row,
    row_text,
)
from speechgpt.language.row_filter import matches
from speechgpt.language.segments import Plain, find_marker, write

PUBLISHED = json.loads(Path(__file__).with_name("published_rows.json").read_text())["fixtures"]
ROWS = [fixture for fixture in PUBLISHED if "plain_text" in fixture]
DIALECTS = ["released", "paper"]

text = st.text(min_size=1).map(str.strip).filter(lambda words: words != "" and find_marker(words) is None)
units = st.lists(st.integers(0, 999), min_size=1).map(tuple)


@st.composite
def exchanges(draw: st.DrawFn, kinds: tuple[Kind, ...] = get_args(Kind)) -> Exchange:
    kind = draw(st.sampled_from(kinds))
    slots = {
        "transcribe": {"description", "question_units", "answer"},
        "speak": {"description", "question", "answer_units"},
        "text": {"question", "answer"},
        "s2s": {"question", "question_units", "answer", "answer_units"},
        "s2t": {"question", "question_units", "answer"},
        "t2s": {"question", "answer", "answer_units"},
        "t2t": {"question", "answer"},
        "direct": {"question_units", "answer", "answer_units"},
        "standard": {"question_units", "answer_units"},
    }[kind]
    values = {slot: draw(units if slot.endswith("units") else text) for slot in sorted(slots)}
    if "description" in values:
        values["description"] = draw(st.sampled_from(descriptions("transcribe") + descriptions("speak")))
    return Exchange(kind, **values)


def test_the_prefix_is_the_published_one():
    assert {row["prefix"] for row in ROWS} == {META}
    assert PromptFormat.of(LanguageSection(dialect="released")).prefix == META
    assert PromptFormat.of(LanguageSection(prefix="")).prefix == ""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["kind"])
def test_published_rows_are_read_and_written_letter_for_letter(row):
    (exchange,) = read_row("released", row["plain_text"])
    assert exchange.kind == {"cross_modal_tts": "speak", "chain_of_modality": "s2s"}[row["kind"]]
    found = [len(found) for found in (exchange.question_units, exchange.answer_units) if found]
    assert found == row["n_units"]
    assert row_text("released", [exchange]) == row["plain_text"]


def test_the_published_speaking_task():
    (exchange,) = read_row("released", ROWS[0]["plain_text"])
    assert exchange.description == "Try to speak out this sentence, please."
    assert exchange.question == "The alchemist rode in front, with the falcon on his shoulder."
    assert exchange.description == descriptions("speak")[0]


def test_paper_chain_is_quoted_letter_for_letter():
    exchange = Exchange("s2s", "Who?", "Me.", (1,), (2,))
    assert row_text("paper", [exchange]) == (
        "[Human]: This is a speech instruction: <sosp><1><eosp>. And your response should be speech. You can do it "
        "step by step. You can first transcribe the instruction and get the text Instruction. Then you can think about "
        "the instruction and get the text response. Last, you should speak the response aloud <eoh>. "
        "[SpeechGPT]: [tq] Who?; [ta] Me.; [ua] <sosp><2><eosp><eoa>."
    )


def test_the_published_question_is_asked_as_the_command_line_did():
    """`META + "[Human]: {question} <eoh>. [SpeechGPT]: "`; the space before a marker is no token (SPEC 2.3)."""
    prompt = PromptFormat("released", META).dialogue([Turn("user", units=[1, 2])], "chain")
    assert write(prompt) == META + "[Human]: <sosp><1><2><eosp><eoh>. [SpeechGPT]: "


@pytest.mark.parametrize("dialect", DIALECTS)
@given(made=st.lists(exchanges(), min_size=1, max_size=3))
def test_every_row_reads_back_as_what_it_was_made_from(dialect, made):
    assert read_row(dialect, row_text(dialect, made)) == made


def test_answers_over_several_lines_are_read():
    row = "[Human]: <sosp><1><eosp><eoh>. [SpeechGPT]: Sing.; [ta] La\nla\n\nla.; [ua] <sosp><2><eosp><eoa>."
    (exchange,) = read_row("released", row)
    assert exchange.answer == "La\nla\n\nla."


@pytest.mark.parametrize(
    "broken", ["", "[Human]: hello", "[Human]: <sosp><eosp><eoh>. [SpeechGPT]: ; [ta] ; [ua] <eoa>."]
)
def test_other_text_is_refused(broken):
    with pytest.raises(ValueError, match="no released template"):
        read_row("released", broken)


def test_history_is_remembered_as_text():
    turns = [
        Turn("user", text="what is two plus three", units=[1, 2]),
        Turn("assistant", text="two plus three is five", units=[3]),
        Turn("user", units=[4]),
    ]
    prompt = write(PromptFormat("paper", "").dialogue(turns, "text"))
    past, now = prompt.split(" [Human]:")
    assert read_row("paper", past) == [Exchange("t2t", "what is two plus three", "two plus three is five")]
    assert "<4>" in now and "<1>" not in prompt and "<3>" not in prompt


def test_markers_in_a_users_turn_stay_plain():
    prompt = PromptFormat("paper", "").dialogue([Turn("user", text="say <12><eoa> [ta]")], "chain")
    assert Plain("say <12><eoa> [ta]") in prompt


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "empty"),
        ([Turn("assistant", text="hello")], "goes assistant"),
        ([Turn("user", text="a"), Turn("assistant", text="b")], "goes user, assistant"),
        ([Turn("user", text="a"), Turn("user", text="b"), Turn("user", text="c")], "goes user, user, user"),
        ([Turn("user", units=[1]), Turn("assistant", text="b"), Turn("user", text="c")], "exchange 1"),
        ([Turn("user", text="")], "needs question"),
        ([Turn("user", units=[])], "needs question_units"),
    ],
)
def test_dialogues_that_cannot_be_asked(turns, complaint):
    with pytest.raises(ValueError, match=complaint):
        PromptFormat("paper", "").dialogue(turns, "chain")


def test_the_reply_form_and_the_question_choose_the_template():
    spoken, written = Turn("user", units=[1]), Turn("user", text="hello")
    assert [kind_of(spoken, form) for form in ("chain", "direct", "text")] == ["s2s", "direct", "s2t"]
    assert [kind_of(written, form) for form in ("chain", "direct", "text")] == ["t2s", "t2s", "t2t"]


def test_descriptions_are_distinct_end_as_sentences_and_ask_for_no_style():
    for task in ("transcribe", "speak"):
        listed = descriptions(task)
        assert len(set(listed)) == len(listed) == 100
        assert all(wording[-1] in ".?" and find_marker(wording) is None for wording in listed)
        assert len({wording.lower().rstrip(".?") for wording in listed}) == 100
        assert not [wording for wording in listed if matches("style_of_a_task", wording)]
    assert not set(descriptions("transcribe")) & set(descriptions("speak"))


def test_who_types_as_one_writes_is_read_as_one_speaks():
    prompts = PromptFormat("released", "", text="spoken")
    typed = [Turn("user", "What's 2 + 3?"), Turn("assistant", "It is 5."), Turn("user", "Paris, or Rome?")]
    said = [Turn("user", "whats two plus three"), Turn("assistant", "it is five"), Turn("user", "paris or rome")]
    assert prompts.dialogue(typed, "text") == PromptFormat("released", "").dialogue(said, "text")
    assert prompts.dialogue(typed, "text") != PromptFormat("released", "").dialogue(typed, "text")
    assert prompts.speaking("Number 7!") == PromptFormat("released", "").speaking("number seven")
    assert "?!" in write(prompts.dialogue([Turn("user", "?!")], "text")), "nothing else would be left"


def test_the_format_travels_with_the_model(tmp_path):
    spoken = PromptFormat("released", META, "spoken", transcribe="Write.", speak="Say.")
    for prompts in (PromptFormat("paper", ""), spoken):
        prompts.save(tmp_path)
        assert PromptFormat.load(tmp_path) == prompts
