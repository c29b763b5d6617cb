import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from speechgpt.evaluation.unit_quality import agreement, speaker_variance, unit_error_rate, usage

FRAMES = st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=2, max_size=60)


def test_units_that_are_phones_agree_wholly():
    perfect = agreement([0, 0, 1, 2, 2], ["a", "a", "b", "c", "c"])
    assert (perfect.phone_purity, perfect.cluster_purity) == (1.0, 1.0)
    assert perfect.pnmi == pytest.approx(1.0)


def test_units_that_say_nothing_agree_by_chance():
    silent = agreement([0, 0, 0, 0], ["a", "a", "a", "b"])
    assert (silent.phone_purity, silent.pnmi) == (0.75, pytest.approx(0.0))


@given(FRAMES)
def test_mutual_information_is_scikit_learns(frames):
    units, phones = [unit for unit, _ in frames], [phone for _, phone in frames]
    by_phone = np.unique(phones, return_counts=True)[1]
    wanted = mutual_info_score(phones, units) / entropy(by_phone) if len(by_phone) > 1 else 1.0
    assert agreement(units, phones).pnmi == pytest.approx(wanted, abs=1e-9)


@given(st.integers(1, 50), st.integers(0, 5))
def test_a_single_phone_leaves_nothing_to_know(frames, unit):
    assert agreement([unit] * frames, ["a"] * frames).pnmi == 1.0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 units and 1 phones"):
        agreement([1, 2, 3], ["a"])


def test_an_edit_is_counted_against_the_first_sequence():
    assert unit_error_rate([1, 2, 3, 4], [1, 3, 4, 9]) == 0.5


def test_speakers_are_compared_on_the_same_text_only():
    clips = {("hello", "ann"): [1, 2, 3, 4], ("hello", "bob"): [1, 2, 9, 4], ("other", "ann"): [7]}
    assert speaker_variance(clips) == 0.25
    assert speaker_variance({("hello", "ann"): [1]}) is None


def test_dead_units_are_counted():
    assert usage([0, 0, 3, 3], clusters=5) == {"dead": 3, "entropy_bits": 1.0}
