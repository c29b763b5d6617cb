"""Where the embeddings of new units start."""

import torch


def centroid_embeddings(centroids: torch.Tensor, hidden: int, std: float, seed: int) -> torch.Tensor:
    """Unit embeddings whose neighbourhoods are those of the units' sounds.

    The centroids [K, D] are standardised in each dimension and projected to [K, hidden] by a seeded Gaussian matrix,
    which nearly keeps distances (Johnson-Lindenstrauss), then scaled so that their spread is `std`, that of the
    embeddings they join. A codebook of one unit has no spread and gives zeros.
    """
    centroids = centroids.detach().float().cpu()
    standard = (centroids - centroids.mean(0)) / centroids.std(0, correction=0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    projected = standard @ torch.randn(centroids.shape[1], hidden, generator=generator)
    return projected * (std / projected.std(correction=0).clamp_min(1e-12))
