"""Write down, answer, read aloud: each step has the last one's words and nothing else."""

from speechgpt.evaluation.cascade import NOTHING, cascade
from speechgpt.language.answers import Answer


def think(questions):
    return [Answer(None, q.upper() if q != "silence" else None, None, q != "silence", "stop") for q in questions]


def speak(texts):
    return [Answer(None, None, [len(text)], True, "length" if len(text) > 4 else "stop") for text in texts]


def test_each_step_works_on_the_last_one_s_words():
    assert cascade(["hi", "hello"], think, speak) == [
        Answer("hi", "HI", [2], True, "stop"),
        Answer("hello", "HELLO", [5], True, "length"),
    ]


def test_without_a_voice_the_text_is_the_answer():
    assert cascade(["hi"], think, None) == [Answer("hi", "HI", None, True, "stop")]


def test_where_one_step_gives_nothing_the_next_is_not_asked():
    asked = []

    def listening(texts):
        asked.extend(texts)
        return speak(texts)

    replies = cascade(["", "silence", "hi", "  "], think, listening)
    assert asked == ["HI"]
    assert replies[0] == replies[3] == NOTHING
    assert (replies[1].transcript, replies[1].text, replies[1].units, replies[1].well_formed) == (
        "silence",
        None,
        None,
        False,
    )
    assert replies[2].units == [2]


def test_nobody_is_asked_about_nothing():
    def never(texts):
        raise AssertionError(texts)

    assert cascade([""], never, never) == [NOTHING]
