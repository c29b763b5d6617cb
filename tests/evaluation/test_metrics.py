import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.evaluation.metrics import (
    Bootstrap,
    Score,
    exact_matches,
    median,
    perplexity,
    share,
    word_error_rate,
    word_errors,
)

NO_INTERVAL = Bootstrap(samples=0)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "length"),
    [
        ("two plus three", "2 plus 3", 0, 3),
        ("two plus three", "two plus free", 1, 3),
        ("two plus three", "", 3, 3),
        ("two", "one two three", 2, 1),
        ("", "uh", 1, 0),
        ("", "", 0, 0),
    ],
)
def test_errors_of_one_utterance(reference, hypothesis, errors, length):
    assert word_errors(reference, hypothesis) == (errors, length)


def test_wer_is_of_the_corpus_and_may_exceed_one():
    score = word_error_rate(["a b c d", "e"], ["a b c d", "x y z"], NO_INTERVAL)
    assert score is not None
    assert score.value == pytest.approx(3 / 5)
    assert word_error_rate(["e"], ["x y z"], NO_INTERVAL) == Score(3.0, 3.0, 3.0, 1)


def test_nothing_measured_is_none_not_zero():
    assert word_error_rate([], [], Bootstrap()) is None
    assert word_error_rate([""], ["noise"], Bootstrap()) is None
    assert share([], Bootstrap()) is None


def test_pairs_must_match():
    with pytest.raises(ValueError):
        word_error_rate(["a"], [], Bootstrap())


def test_a_missing_answer_is_wrong():
    assert exact_matches(["five", "five", "no"], ["5.", None, "yes"]) == [True, False, False]


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_interval_holds_the_value_and_comes_out_the_same_again(outcomes):
    score = share(outcomes, Bootstrap(samples=200, seed=3))
    assert score is not None
    assert 0 <= score.low <= score.high <= 1
    assert score == share(outcomes, Bootstrap(samples=200, seed=3))
    if len(set(outcomes)) == 1:
        assert score.low == score.value == score.high


def test_more_utterances_make_the_interval_narrower():
    few, many = (share([True, False] * n, Bootstrap(seed=1)) for n in (5, 500))
    assert few is not None and many is not None
    assert many.high - many.low < (few.high - few.low) / 5


def test_perplexity_of_an_even_guess_is_the_number_of_choices():
    score = perplexity([10 * math.log(8), 5 * math.log(8)], [10, 5], NO_INTERVAL)
    assert score is not None
    assert score.value == pytest.approx(8)


def test_a_median_has_an_interval_too():
    assert median([], Bootstrap()) is None
    assert median([3.0, 1.0, 9.0], NO_INTERVAL) == Score(3.0, 3.0, 3.0, 3)
    score = median([float(n) for n in range(100)], Bootstrap())
    assert score is not None and score.low < score.value == 49.5 < score.high
