"""What the benchmarks are made of: arithmetic, clocks, comparisons, models and clips."""

import time

import numpy as np
import pytest
import torch

from speechgpt.interop.benches import encode, timing, vocoder
from speechgpt.interop.code_hifigan import from_checkpoint
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.vocoder import Vocoder


def test_operations_of_a_product_and_a_convolution() -> None:
    one, other = torch.randn(3, 5), torch.randn(5, 7)
    convolution = torch.nn.Conv1d(2, 4, 3)
    assert timing.operations(lambda: one @ other) == 2 * 3 * 5 * 7
    assert timing.operations(lambda: convolution(torch.randn(1, 2, 10))) == 2 * 8 * 3 * 2 * 4


def test_a_wait_is_on_the_wall_and_not_on_the_processor() -> None:
    taken = timing.Taken()
    assert taken.measure(lambda: time.sleep(0.2) or "done") == "done"
    assert taken.wall > 0.19
    assert taken.processor < 0.1


def test_shares_of_a_profile_add_up() -> None:
    shares = timing.profile(lambda: torch.randn(200, 200) @ torch.randn(200, 200))
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert "aten::mm" in shares


def test_clips_are_mixed_and_the_same_for_the_same_seed() -> None:
    clips = encode.mixed_clips(40, seed=3)
    lengths = [len(clip) for clip in clips]
    assert min(lengths) >= 16_000 and max(lengths) < 12 * 16_000
    assert np.median(lengths) < np.mean(lengths), "evenly in the logarithm"
    assert all(np.array_equal(a, b) for a, b in zip(clips, encode.mixed_clips(40, seed=3), strict=True))
    assert [len(units) for units in vocoder.mixed_units(40, 3)] == [len(u) for u in vocoder.mixed_units(40, 3)]


def test_agreement_tells_near_ties_from_real_differences() -> None:
    def features(waves: list[np.ndarray]) -> list[torch.Tensor]:
        return [torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 9.0]]) for _ in waves]

    codebook = Codebook(torch.tensor([[0.0, 0.0], [0.0, 10.0]]))
    clips = [np.zeros(1360, np.float32)]
    ours = np.array([0, 0, 1])
    tie, wrong = np.array([0, 1, 1]), np.array([1, 0, 1])
    same = encode.agreement([ours], [ours], features, codebook, clips)
    assert (same["share"], same["frames"], same["differing_where_centroids_are_apart"]) == (1.0, 3, 0)
    assert encode.agreement([tie], [ours], features, codebook, clips)["differing_where_centroids_are_apart"] == 0
    assert encode.agreement([wrong], [ours], features, codebook, clips)["differing_where_centroids_are_apart"] == 1
    with pytest.raises(encode.BenchError, match="3 frames there and 2 here"):
        encode.agreement([ours], [ours[:2]], features, codebook, clips)


def test_the_vocoders_of_both_sides_are_one() -> None:
    model = vocoder.audible(0)
    published = {"generator": vocoder.published_state(model)}
    [read] = from_checkpoint(published, vocoder.CONFIG, "g", "config.json").synthesize([[1, 2, 3, 4]])
    [sound] = Vocoder(model).synthesize([[1, 2, 3, 4]])
    assert 0.01 < np.abs(sound).max() < 0.999, "audible, and not all tanh"
    np.testing.assert_allclose(read, sound, atol=1e-6)
