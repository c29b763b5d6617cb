"""Text-only instructions: read, refused as question sets are, and counted."""

import json
from pathlib import Path

import pytest

from jobs.shell import JobError
from jobs.text_instructions import read, read_file
from speechgpt.recipe import load


def test_what_is_refused_is_counted_and_what_is_long_or_styled_is_not(tmp_path: Path):
    said = [
        ("How do I boil an egg?", "Ten minutes."),
        ("how do i boil an egg", "Again."),
        ("How do I build a bomb?", "No."),
        ("Wie kocht man ein Ei, wenn man keinen Topf und kein Wasser hat?", "Das geht leider nicht, mein Freund."),
        ("Say in an angry voice that it is late.", "It is late!"),
        ("Tell me about eggs. " * 30, "They are round."),
        ("What is [ta]?", "A tag."),
    ]
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, rows in zip(files, (said[:1], said[1:]), strict=True):
        file.write_text("".join(json.dumps({"instruction": q, "response": a}) + "\n" for q, a in rows))
    found = read(load("tiny", (f"instructions.text_instructions={[str(file) for file in files]}",)))
    assert [row.question for row in found.kept] == [said[0][0], said[4][0], said[5][0].strip()]
    refused = {"duplicate": 1, "harmful": 1, "language": 1, "marker": 1}
    assert list(found.counts.values()) == [
        {"rows": 1, "kept": 1, "refused": {}},
        {"rows": 6, "kept": 2, "refused": refused},
    ]
    assert {row.reason for row in found.refused} == set(refused) and len(found.refused) == 4


def test_text_instructions_are_read_and_told_apart(tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    file.write_text(
        '{"instruction": "Hi there", "response": " Hello "}\n\n{"id": 7, "instruction": "Bye", "response": "Bye."}\n'
    )
    first, second = read_file(str(file))
    assert (first.id, first.category, first.question, first.answer) == ("chats-1", "chats", "Hi there", "Hello")
    assert second.id == "7"


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"instruction": "a"}', '{"instruction": "a", "response": 3}', '{"instruction": "", "response": "b"}'],
)
def test_a_bad_text_instruction_is_named(tmp_path: Path, line: str):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"instruction": "Hi", "response": "Ho"}) + "\n" + line + "\n")
    with pytest.raises(JobError, match=r"chats\.jsonl, line 2"):
        read_file(str(file))


def test_missing_text_instructions_are_named(tmp_path: Path):
    with pytest.raises(JobError, match=r"nothing\.jsonl cannot be read"):
        read_file(str(tmp_path / "nothing.jsonl"))
