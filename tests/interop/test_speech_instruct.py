"""Published rows: every form that the files are known to hold, and what is no row."""

import json
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.interop.speech_instruct import (
    PublishedRow,
    PublishedRowError,
    PublishedText,
    form_of,
    read,
    read_line,
    rewrite,
)
from speechgpt.language.prompts import META, Exchange, Kind, descriptions, read_row, row_text
from speechgpt.language.segments import find_marker

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("language", "published_rows.json").read_text())["fixtures"]
ROWS = [fixture for fixture in PUBLISHED if "plain_text" in fixture]
STAGE_1 = [fixture for fixture in PUBLISHED if fixture["kind"] == "stage1_line"]
U, V = "<sosp><1><2><eosp>", "<sosp><3><eosp>"
HEARD, SPOKEN = (1, 2), (3,)

text = st.text(min_size=1).map(str.strip).filter(lambda words: words != "" and find_marker(words) is None)
units = st.lists(st.integers(0, 999), min_size=1, max_size=20).map(tuple)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    kind: Kind = draw(st.sampled_from(get_args(Kind)))
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


def row(plain_text: str, prefix: str = META) -> PublishedRow:
    return read(PublishedText(prefix, plain_text))


def only(plain_text: str) -> Exchange:
    (exchange,) = row(plain_text).exchanges
    return exchange


@pytest.mark.parametrize("fixture", ROWS, ids=lambda fixture: fixture["kind"])
def test_the_published_rows_keep_every_byte_and_say_what_they_are(fixture):
    line = json.dumps({key: fixture[key] for key in ("prefix", "plain_text")}).encode()
    found = read_line(line, "json")
    assert found == (fixture["prefix"], fixture["plain_text"])
    said = read(found)
    assert list(said.exchanges) == read_row("released", fixture["plain_text"])
    assert rewrite(said, "released", META) == found


@pytest.mark.parametrize("fixture", STAGE_1)
def test_the_published_stage_1_lines(fixture):
    found = read_line(fixture["text"].encode(), "text")
    assert found == ("", fixture["text"])
    said = read(found)
    assert (said.kind, [len(said.units)]) == ("units", fixture["n_units"])
    assert rewrite(said, "paper", META) == found


@pytest.mark.parametrize("dialect", ["released", "paper"])
@given(made=st.lists(exchanges(), min_size=1, max_size=3))
def test_whatever_a_dialect_writes_is_read_as_what_it_was_made_from(dialect, made):
    written = PublishedText(META, row_text(dialect, made))
    line = json.dumps(written._asdict()).encode()
    assert read_line(line, "json") == written
    said = read(written)
    assert (said.kind, list(said.exchanges)) == (made[-1].kind, made)
    assert rewrite(said, dialect, META) == written


@given(text=st.text())
def test_no_text_is_anything_but_a_row_or_a_row_error(text):
    for wrapped in (text, f"[Human]: {text}<eoh> [SpeechGPT]: {text}<eoa>", f"[Human]: {text}"):
        try:
            row(wrapped)
        except PublishedRowError as error:
            assert error.reason == "broken_markers"


def heard(answer: str, description: str = "Write.") -> Exchange:
    return Exchange("transcribe", answer=answer, question_units=HEARD, description=description)


def said_aloud(question: str) -> Exchange:
    return Exchange("speak", question=question, answer_units=SPOKEN, description="Say.")


def chain(question: str = "Q?", answer: str = "A.") -> Exchange:
    return Exchange("s2s", question, answer, HEARD, SPOKEN)


@pytest.mark.parametrize(
    ("plain_text", "exchange"),
    [
        # Task, then the marker and the end in each of their spellings (SPEC 1.3, 1.4).
        (f"[Human]: Write. This is input: {U}<eoh> [SpeechGPT]: a b<eoa> ", heard("a b")),
        (f"[Human]: Write?. This is input: {U}<eoh>. [SpeechGPT]: a b<eoa>.", heard("a b", "Write?.")),
        (f"[Human]: Write. This is the input: {U} <eoh>. [SpeechGPT]: a <eos>.", heard("a")),
        (f"[Human]:Write. This is input: {U}<eoh>.[SpeechGPT]: a<eos>.", heard("a")),
        (f"[Human]: Say. This is input: a b<eoh> [SpeechGPT]: {V}<eoa> ", said_aloud("a b")),
        (f"[Human]: Say. This is input: This is input: b<eoh> [SpeechGPT]: {V}<eoa>", said_aloud("This is input: b")),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: Q?; [ta] A.; [ua] {V}<eoa>.", chain()),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: [tq] Q?; [ta] A.; [ua] {V}<eoa>.", chain()),
        (f"[Human]: {U}<eoh> [SpeechGPT]: Q\nr; [ta] A;\n\nB; [ua] {V} <eoa>", chain("Q\nr", "A;\n\nB")),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: [tq] Q; [ta] A<eos>", Exchange("s2t", "Q", "A", HEARD)),
        ("[Human]: <sosp> <1> <2> <eosp> <eoh>. [SpeechGPT]: Q; [ta] A<eoa>", Exchange("s2t", "Q", "A", HEARD)),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: [ta] A; [ua] {V}<eoa>.", Exchange("direct", "", "A", HEARD, SPOKEN)),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: {V}<eoa>.", Exchange("standard", "", "", HEARD, SPOKEN)),
        (f"[Human]: Q<eoh>. [SpeechGPT]: [ta] A; [ua] {V}<eoa>.", Exchange("t2s", "Q", "A", (), SPOKEN)),
        ("[Human]: Q<eoh>. [SpeechGPT]: [ta] A<eoa>.", Exchange("t2t", "Q", "A")),
        # As the paper's form is remembered: without <eoh>.
        (
            "[Human]: This is a text instruction: Q. And your response should be text. You can think about the "
            "instruction and get the text response. [SpeechGPT]: [ta] A<eoa>.",
            Exchange("t2t", "Q", "A"),
        ),
        (
            f"[Human]: This is the speech instruction: {U}. You can do it step by step. You can transcribe the "
            "instruction, get the text response and speak the response. <eoh>. "
            f"[SpeechGPT]: [tq] Q?; [ta] A.; [ua] {V} <eoa>.",
            chain(),
        ),
        ("[Human]: Q\nq<eoh> [SpeechGPT]: A\n\na<eoa>", Exchange("text", "Q\nq", "A\n\na")),
        (
            "[Human]: Sum up. This is input: a text<eoh> [SpeechGPT]: short<eoa>",
            Exchange("text", "Sum up. This is input: a text", "short"),
        ),
    ],
)
def test_the_forms_of_the_files(plain_text, exchange):
    assert only(plain_text) == exchange


def test_a_chat_of_several_turns():
    said = row(
        "[Human]: a<eoh> [SpeechGPT]: b<eoa> [Human]: c<eoh> [SpeechGPT]: d<eoa>\n[Human]: e<eoh>. [SpeechGPT]: f<eoa>."
    )
    assert [(e.question, e.answer) for e in said.exchanges] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert said.kind == "text"
    assert rewrite(said, "paper", "").plain_text == (
        "[Human]: a<eoh>. [SpeechGPT]: b<eoa>. [Human]: c<eoh>. [SpeechGPT]: d<eoa>. "
        "[Human]: e<eoh>. [SpeechGPT]: f<eoa>."
    )


def test_rewriting_gives_a_row_without_a_task_its_description():
    said = row(f"[Human]: This is input: {U}<eoh> [SpeechGPT]: a<eoa>")
    (exchange,) = read_row("paper", rewrite(said, "paper", "").plain_text)
    assert exchange.description == descriptions("transcribe")[0]


@pytest.mark.parametrize(
    ("plain_text", "complaint"),
    [
        ("", "neither a row"),
        ("hello", "neither a row"),
        ("<sosp><eosp>", "neither a row"),
        ("<sosp><1>", "neither a row"),
        ("<sosp><01><eosp>", "neither a row"),
        ("<sosp><1><eosp> and more", "neither a row"),
        (f"<sosp><{'9' * 5000}><eosp>", "neither a row"),
        ("Hi. [Human]: a<eoh> [SpeechGPT]: b<eoa>", "before the first"),
        ("[Human]: a<eoh> b<eoa>", r"turn 1 has no \[SpeechGPT\]:"),
        ("[Human]: a [SpeechGPT]: b<eoa>", "turn 1 has no <eoh>"),
        ("[Human]: <eoh> [SpeechGPT]: b<eoa>", "nothing before it"),
        ("[Human]: a<eoh>! [SpeechGPT]: b<eoa>", "turn 1 has no <eoh>"),
        ("[Human]: a<eoh> [SpeechGPT]: b", "turn 1 does not end with <eoa> or <eos>"),
        ("[Human]: a<eoh> [SpeechGPT]: b<eoa> c", "turn 1 does not end"),
        ("[Human]: a<eoh> [SpeechGPT]: b<eoa> [Human]: c<eoh> [SpeechGPT]: d", "turn 2 does not end"),
        ("[Human]: a<eoh> [SpeechGPT]: <eoa>", "none of SpeechGPT's tasks"),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: Q; [ta] A; [ua] <eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: Q; [ta] A; [ua] <sosp><3><eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: Q; [ta] ; [ua] {V}<eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: A<eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: a<eoh>. [SpeechGPT]: {V}<eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: a<eoh>. [SpeechGPT]: a; [ta] A; [ua] {V}<eoa>.", "none of SpeechGPT's tasks"),
        (f"[Human]: {U}<eoh>. [SpeechGPT]: Q; [ta] A; [ta] B; [ua] {V}<eoa>.", r"\[ta\] more than once"),
        ("[Human]: a <12> b<eoh> [SpeechGPT]: c<eoa>", "the question of turn 1 holds the control marker <12>"),
        (f"[Human]: a<eoh> [SpeechGPT]: b {V} c<eoa>", "the answer of turn 1 holds the control marker <sosp>"),
        (f"[Human]: Say <eosp>. This is input: a<eoh> [SpeechGPT]: {V}<eoa>", "the description of turn 1 holds"),
        ("[Human]: a<eoh> [SpeechGPT]: b<eoa> c<eoa>", "the answer of turn 1 holds the control marker <eoa>"),
        ("[Human]: a<eoh> [SpeechGPT]: b [SpeechGPT]: c<eoa>", "holds the control marker"),
    ],
)
def test_broken_markers_are_told(plain_text, complaint):
    with pytest.raises(PublishedRowError, match=complaint) as error:
        row(plain_text)
    assert error.value.reason == "broken_markers"


def test_a_prefix_with_markers_is_refused():
    with pytest.raises(PublishedRowError, match=r"the prefix holds the control marker \[Human\]"):
        row("[Human]: a<eoh> [SpeechGPT]: b<eoa>", prefix="You are. [Human]: x")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", r"not a JSON object \(Expecting"),
        (b"[1, 2]", "not list.*jq"),
        (b"[", r"not a JSON object.*jq"),
        (b'"text"', "not str"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"plain_text": "a"}', "'prefix' is expected; it is missing"),
        (b'{"prefix": "", "plain_text": 3}', "'plain_text' is expected; it is int"),
        (b'{"prefix": "", "plain_text": null}', "it is NoneType"),
        (b'{"prefix": "", "plain_text": "\\ud83d"}', "surrogate"),
        (b'{"prefix": "\xff"', "byte 13 is not UTF-8"),
    ],
)
def test_lines_that_are_no_object_of_the_two_texts(line, complaint):
    with pytest.raises(PublishedRowError, match=complaint) as error:
        read_line(line, "json")
    assert error.value.reason == "unreadable"
    assert error.value.at("data/a.jsonl", 7).startswith("data/a.jsonl, line 7: ")


def test_errors_never_quote_a_row():
    secret = "4711 Example Street"
    for line in (f"{secret}", f'{{"prefix": "", "plain_text": "{secret}"', f'{{"plain_text": "{secret}"}}'):
        with pytest.raises(PublishedRowError) as error:
            read_line(line.encode(), "json")
        assert secret not in error.value.at("f", 1)
    for plain_text in (
        secret,
        f"[Human]: {secret} [SpeechGPT]: {secret}",
        f"[Human]: <1>{secret}<eoh>[SpeechGPT]: b<eoa>",
    ):
        with pytest.raises(PublishedRowError) as error:
            row(plain_text)
        assert secret not in str(error.value)


def test_a_hostile_row_costs_no_more_than_its_length():
    began = time.process_time()
    for hostile in ("<eoa>" * 40_000 + "x", "<sosp>" + "<1>" * 100_000, "This is input: " * 30_000, "; [ta]" * 30_000):
        for wrapped in (f"[Human]: {hostile}<eoh> [SpeechGPT]: a<eoa>", f"[Human]: a<eoh> [SpeechGPT]: {hostile}<eoa>"):
            try:
                row(wrapped)
            except PublishedRowError:
                continue
    assert time.process_time() - began < 5


def test_the_form_is_in_the_name():
    names = ("a.jsonl", "s3://b/a.json.gz", "train.txt", "x/dev.txt.gz")
    assert [form_of(name) for name in names] == ["json", "json", "text", "text"]
