import pytest

from speechgpt.language.normaliser import ordinal, words
from speechgpt.language.numbers import in_words


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("What is 2 plus 3?", "what is two plus three"),
        ("2 + 3 = 5.", "two plus three equals five"),
        ("21 - 4", "twenty one minus four"),
        ("6×7", "six times seven"),
        ("the 3rd month", "the third month"),
        ("the 21st day", "the twenty first day"),
        ("It's twenty-one o\u2019clock", "its twenty one oclock"),
        ("a grey, COLOURED cat", "a gray coloured cat"),
        ("100%", "one hundred percent"),
        ("It’s 342 o'clock — isn't it, K.2000?", "its three hundred forty two oclock isnt it k 2000"),
        ("", ""),
    ],
)
def test_both_ways_to_write_it_count_as_the_same(written, spoken):
    assert words(written) == spoken.split()


def test_sound_alikes_stay_different():
    assert words("free") != words("three")
    assert words("to") != words("two")


def test_long_and_broken_numbers_are_left_alone():
    assert words("in 1984") == ["in", "1984"]


def test_numbers_in_words():
    assert [in_words(n) for n in (0, 13, 40, 99, 100, 342)] == [
        "zero",
        "thirteen",
        "forty",
        "ninety nine",
        "one hundred",
        "three hundred forty two",
    ]
    assert [ordinal(n) for n in (1, 4, 12, 20, 31)] == ["first", "fourth", "twelfth", "twentieth", "thirty first"]
