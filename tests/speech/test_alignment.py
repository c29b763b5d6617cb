import numpy as np

from speechgpt.speech.alignment import align

WORDS = np.random.default_rng(0).normal(size=(12, 16))


def said(durations: list[int], noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of the words at these durations, and which word each frame is of."""
    order = np.repeat(np.arange(12), durations)
    return WORDS[order] + np.random.default_rng(seed).normal(0, noise, (len(order), 16)), order


def test_a_clip_is_aligned_with_itself() -> None:
    frames, _ = said([3] * 12, 0.0)
    noisy = frames + np.random.default_rng(1).normal(0, 0.1, frames.shape)
    np.testing.assert_array_equal(align(noisy, noisy), np.arange(36))


def test_a_slower_and_a_faster_voice_are_found_word_for_word() -> None:
    mine, my_words = said([4, 2, 6, 3, 1, 5, 2, 4, 3, 2, 5, 3], 0.2)
    for durations in ([2, 5, 3, 6, 2, 1, 4, 3, 5, 4, 2, 6], [9] * 12, [1] * 12):
        theirs, their_words = said(durations, 0.2, seed=1)
        path = align(mine, theirs)
        assert (np.diff(path) >= 0).all() and path.min() >= 0 and path.max() < len(theirs)
        assert (their_words[path] == my_words).mean() > 0.95


def test_clips_of_one_frame_are_aligned() -> None:
    assert align(WORDS[:1], WORDS[:3]).shape == (1,)
    assert align(WORDS[:3], WORDS[:1]).tolist() == [0, 0, 0]
