"""Units start where their sounds are."""

import torch

from speechgpt.language.embeddings import centroid_embeddings


def test_they_have_the_spread_of_the_embeddings_they_join():
    made = centroid_embeddings(torch.randn(200, 64) * 5 + 3, hidden=32, std=0.02, seed=1)
    assert made.shape == (200, 32)
    assert abs(made.std(correction=0).item() - 0.02) < 1e-6
    assert abs(made.mean().item()) < 0.002


def test_neighbours_stay_neighbours():
    torch.manual_seed(0)
    groups = torch.randn(10, 64).repeat_interleave(5, 0) * 4 + torch.randn(50, 64) * 0.2
    made = centroid_embeddings(groups, hidden=48, std=1.0, seed=1)
    nearest = (torch.cdist(made, made) + torch.eye(50) * 1e9).argmin(1)
    assert (nearest // 5 == torch.arange(50) // 5).all()


def test_the_seed_decides():
    centroids = torch.randn(20, 8)
    first, again, other = (centroid_embeddings(centroids, 4, 1.0, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_single_unit_gives_finite_numbers():
    assert torch.isfinite(centroid_embeddings(torch.randn(1, 8), 4, 1.0, 1)).all()
