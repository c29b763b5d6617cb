"""Rows of question sets in the forms that people publish them in, and what is none."""

import pytest

from speechgpt.language.config import QuestionsSection
from speechgpt.language.conversations import AskedTurn, Conversation, ConversationError, read

SECTION = QuestionsSection()
DIALOGUE = (("Hi?", "Hello."), ("Who?", "Me."))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"question": "Hi?", "answer": " Hello. "}, {"question": "Who?", "answer": "Me."}]},
        {
            "messages": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "Me."},
            ]
        },
        {
            "messages": [
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Who?"},
                {"from": "gpt", "value": "Me."},
            ]
        },
    ],
)
def test_a_dialogue_in_each_of_its_forms(row):
    assert read(row, SECTION, "set-1", "set") == Conversation("set-1", "set", DIALOGUE)


def test_a_question_and_its_answer_under_whatever_names():
    section = QuestionsSection(question="instruction", answer="response")
    row = {"instruction": "Hi?", "response": "Hello.", "language": "en_GB", "category": "greetings", "more": 1}
    assert read(row, section, "set-1", "set") == Conversation("set-1", "greetings", (("Hi?", "Hello."),), "en-gb")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (None, "an object is expected, not a NoneType"),
        ({"instruction": "Hi"}, r"name the row's keys in instructions\.questions\.question"),
        ({"question": "secret", "answer": ""}, "'answer' is empty or no text"),
        ({"question": "secret", "answer": 3}, "'answer' is empty or no text"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": "secret"}, "not a list of turns"),
        ({"messages": ["secret"]}, "something else than objects"),
        ({"messages": [{"role": "system", "content": "secret"}]}, "the role 'system'"),
        ({"messages": [{"role": "user", "content": "secret"}]}, "from user to assistant"),
        ({"messages": [{"role": "assistant", "content": "secret"}, {"role": "user", "content": "b"}]}, "from user to"),
    ],
)
def test_what_is_no_dialogue_is_said_without_showing_it(row, complaint):
    with pytest.raises(ConversationError, match=complaint) as raised:
        read(row, SECTION, "set-1", "set")
    assert "secret" not in str(raised.value)


def test_turns_remember_what_was_said_before_them():
    talk = Conversation("t", "c", tuple((f"q{n}", f"a{n}") for n in range(1, 6)))
    asked = list(talk.asked(history=2, max_answer_words=35))
    assert [turn.id for turn in asked] == ["t.1", "t.2", "t.3", "t.4", "t.5"]
    assert asked[0].earlier == ()
    assert asked[4] == AskedTurn("t.5", "q5", "a5", (("q3", "a3"), ("q4", "a4")))
    assert all(not turn.earlier for turn in talk.asked(history=0, max_answer_words=35))


def test_a_long_answer_is_neither_spoken_nor_remembered():
    talk = Conversation("t", "c", (("q1", "a1"), ("q2", "word " * 35), ("q3", "a3"), ("q4", "word " * 34)))
    asked = {turn.id: turn.earlier for turn in talk.asked(history=3, max_answer_words=35)}
    assert asked == {"t.1": (), "t.3": (), "t.4": (("q3", "a3"),)}


def test_a_single_question_keeps_its_rows_name():
    assert [turn.id for turn in Conversation("t", "c", (("q", "a"),)).asked(3, 35)] == ["t"]
