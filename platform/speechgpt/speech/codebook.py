"""The k-means codebook: fit, assignment, and its file `kmeans.safetensors`."""

import os
from pathlib import Path

import numpy as np
import torch

FILE = "kmeans.safetensors"
_START_FRAMES = 20
"""Frames for each cluster that the k-means++ start looks at; over all frames it would take longer than the passes."""
_PERMUTED = 1 << 22
"""Frames whose whole order is drawn; of more, the order alone would take gigabytes."""


class CodebookError(ValueError):
    """A codebook file that cannot be used, or features of the wrong width."""


class Codebook:
    """K centroids of D dimensions. Ties go to the lowest index, as in fairseq's simple_kmeans (SPEC 3.4)."""

    def __init__(self, centroids: torch.Tensor) -> None:
        self.centroids = centroids.float().contiguous()
        self._half_squares = self.centroids.square().sum(1) / 2

    def to(self, device: torch.device) -> "Codebook":
        """The same on another device."""
        return Codebook(self.centroids.to(device))

    @property
    def clusters(self) -> int:
        return self.centroids.shape[0]

    def assign(self, frames: torch.Tensor) -> torch.Tensor:
        """Nearest centroid of each frame. frames: [..., D] -> int64 [...]."""
        if frames.shape[-1] != self.centroids.shape[1]:
            raise CodebookError(f"features have {frames.shape[-1]} dimensions, the codebook {self.centroids.shape[1]}")
        return (frames.float() @ self.centroids.T - self._half_squares).argmax(-1)

    def margins(self, frames: torch.Tensor) -> torch.Tensor:
        """How much farther the second-nearest centroid is, in distance. frames: [N, D] -> [N]."""
        nearest = torch.cdist(frames.float(), self.centroids).topk(2, largest=False).values
        return nearest[:, 1] - nearest[:, 0]

    def save(self, directory: str | os.PathLike) -> Path:
        from safetensors.torch import save_file

        path = Path(directory) / FILE
        save_file({"centroids": self.centroids}, path)
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Codebook":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(directory) / FILE
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CodebookError(f"{path}: not a codebook: {error}") from None
        if set(tensors) != {"centroids"} or tensors["centroids"].dim() != 2:
            raise CodebookError(f"{path}: expected one tensor `centroids` [K, D], found {sorted(tensors)}")
        return cls(tensors["centroids"])


def start_sample(count: int, clusters: int, seed: int) -> np.ndarray:
    """Numbers of the frames, of `count`, that the k-means++ start looks at, in the order drawn; int64 [n]."""
    size, draw = min(count, _START_FRAMES * clusters), np.random.default_rng(seed)
    if count > _PERMUTED:
        return draw.choice(count, size, replace=False)
    return draw.permutation(count)[:size]


def fit(frames: np.ndarray, clusters: int, *, seed: int, iterations: int = 30) -> tuple[Codebook, dict]:
    """k-means++ start on a sample, then full passes, by scikit-learn. frames: float32 [N, D].

    Returns the codebook and a report: inertia per frame, iterations run, dead units.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus

    if len(frames) < clusters:
        raise CodebookError(
            f"{len(frames)} frames cannot make {clusters} clusters; give more audio or a smaller codebook.clusters"
        )
    sample = start_sample(len(frames), clusters, seed)
    start, _ = kmeans_plusplus(frames[sample].astype(np.float64), clusters, random_state=seed)
    model = KMeans(clusters, init=start.astype(np.float32), n_init=1, max_iter=iterations, random_state=seed)
    labels = model.fit_predict(np.ascontiguousarray(frames, dtype=np.float32))
    used = np.bincount(labels, minlength=clusters)
    report = {
        "frames": len(frames),
        "inertia": float(model.inertia_ / len(frames)),
        "iterations": int(model.n_iter_),
        "dead_units": int((used == 0).sum()),
    }
    return Codebook(torch.from_numpy(model.cluster_centers_)), report
