from pathlib import Path

import numpy as np
import pytest
import torch

from speechgpt.speech.codebook import Codebook, CodebookError, fit


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(6, 8)).astype(np.float32) * 10
    which = draw.integers(6, size=900)
    return centres[which] + draw.normal(size=(900, 8)).astype(np.float32), which


def test_fit_finds_separate_clusters_and_reports_them() -> None:
    frames, which = blobs()
    codebook, report = fit(frames, 6, seed=0)
    units = codebook.assign(torch.from_numpy(frames)).numpy()
    assert len({(a, b) for a, b in zip(which, units, strict=True)}) == 6
    assert report["dead_units"] == 0
    assert report["inertia"] == pytest.approx(8, rel=0.1)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(fit(blobs()[0], 6, seed=3)[0].save(tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_assignment_equals_the_plain_distance() -> None:
    codebook = Codebook(torch.randn(50, 16))
    frames = torch.randn(200, 16)
    assert torch.equal(codebook.assign(frames), torch.cdist(frames, codebook.centroids).argmin(1))


def test_ties_go_to_the_lowest_unit() -> None:
    codebook = Codebook(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert codebook.assign(torch.tensor([[1.0, 0.0]])).tolist() == [0]


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(CodebookError, match="768 dimensions, the codebook 16"):
        Codebook(torch.randn(5, 16)).assign(torch.randn(3, 768))


def test_too_little_audio_is_refused() -> None:
    with pytest.raises(CodebookError, match="10 frames cannot make 20 clusters"):
        fit(np.zeros((10, 4), np.float32), 20, seed=0)


def test_a_file_that_is_no_codebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "kmeans.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CodebookError, match=r"kmeans\.safetensors"):
        Codebook.load(tmp_path)
