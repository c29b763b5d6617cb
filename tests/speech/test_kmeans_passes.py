import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.speech import codebook, kmeans_passes
from speechgpt.speech.codebook import CodebookError


def frames_of(seed: int, count: int = 4000, dimensions: int = 12) -> np.ndarray:
    """Lumps of unlike size, as sounds are."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(40, dimensions)) * 3
    which = draw.zipf(1.5, size=count).clip(max=40) - 1
    return (centres[which] + draw.normal(size=(count, dimensions))).astype(np.float32)


def fitted(frames: np.ndarray, clusters: int, seed: int, cuts: int = 7, iterations: int = 30):
    blocks = np.array_split(frames, cuts)
    sample = frames[np.random.default_rng(seed).permutation(len(frames))[: 20 * clusters]]
    return kmeans_passes.fit(
        kmeans_passes.start(sample, clusters, seed),
        lambda centroids: kmeans_passes.partial(blocks, centroids),
        iterations,
        float(frames.var(0).mean()),
    )


@pytest.mark.parametrize("seed", range(5))
def test_inertia_is_that_of_scikit_learn(seed):
    """Within 1 % on the same sample; measured: to five millionths, the start being the same."""
    frames = frames_of(seed)
    _, ours = fitted(frames, 30, seed)
    _, theirs = codebook.fit(frames, 30, seed=seed)
    assert ours["inertia"] == pytest.approx(theirs["inertia"], rel=0.01)
    assert ours["frames"] == 4000 and ours["dead_units"] == theirs["dead_units"] == 0
    course = ours["inertia_course"]
    assert all(later <= earlier * 1.0001 for earlier, later in zip(course, course[1:], strict=False))


@given(cuts=st.integers(1, 60), chunk=st.integers(1, 500))
def test_sums_do_not_depend_on_how_frames_are_cut(cuts, chunk):
    frames, centroids = frames_of(1, 600), frames_of(2, 9)
    whole = kmeans_passes.partial([frames], centroids)
    kept, kmeans_passes._CHUNK = kmeans_passes._CHUNK, chunk
    try:
        parts = [kmeans_passes.partial([block], centroids) for block in np.array_split(frames, cuts)]
    finally:
        kmeans_passes._CHUNK = kept
    found = kmeans_passes.added(parts)
    assert (found.counts == whole.counts).all() and found.counts.sum() == 600
    np.testing.assert_allclose(found.sums, whole.sums, rtol=1e-9, atol=1e-9)
    assert found.inertia == pytest.approx(whole.inertia, rel=1e-5)
    np.testing.assert_allclose(np.sort(found.far_distances), np.sort(whole.far_distances), rtol=1e-3)


def test_units_that_nobody_uses_are_moved_or_reported():
    frames = frames_of(0)
    start = np.concatenate([frames[:5], np.full((3, 12), 1e3, np.float32)])
    moved, report = kmeans_passes.fit(start, lambda c: kmeans_passes.partial([frames], c), 30, 1.0)
    assert report["dead_units"] == 0 and np.abs(moved.centroids.numpy()).max() < 100
    alike = np.repeat(frames[:4], 10, axis=0)
    _, report = kmeans_passes.fit(
        np.repeat(frames[:4], 2, axis=0), lambda c: kmeans_passes.partial([alike], c), 30, 1.0
    )
    assert report["dead_units"] == 4, "four sounds cannot fill eight units"


def test_the_same_frames_give_the_same_bytes():
    first, second = (fitted(frames_of(3), 30, 3)[0].centroids.numpy().tobytes() for _ in range(2))
    assert first == second


def test_too_little_audio_is_refused():
    with pytest.raises(CodebookError, match="10 frames cannot make 20 clusters"):
        kmeans_passes.start(np.zeros((10, 4), np.float32), 20, 0)
