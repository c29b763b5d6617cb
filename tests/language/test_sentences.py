"""Text is said sentence by sentence, and no word of it is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.language.sentences import sayable

TEXTS = st.lists(st.sampled_from(["one", "two,", "three.", "four;", "5?", "a.b"]), max_size=60).map(" ".join)


@given(TEXTS, st.integers(1, 12))
def test_pieces_are_short_and_hold_every_word(text: str, most: int) -> None:
    pieces = sayable(text, most)
    assert " ".join(pieces) == text and all(len(piece.split()) <= most for piece in pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("  as\tit is", ["  as\tit is"]),
        ("one two three. Four five six! Seven eight nine", ["one two three.", "Four five six!", "Seven eight nine"]),
        ("One two, three four five.", ["One two,", "three four five."]),
        ("One two three four five six", ["One two three four", "five six"]),
        ("It is 3.5 m. No. Yes it is.", ["It is 3.5 m.", "No. Yes it is."]),
        ("Dr. Who came in.", ["Dr. Who came in."]),
    ],
)
def test_cuts_come_where_one_would_pause(text: str, pieces: list[str]) -> None:
    assert sayable(text, 4) == pieces
