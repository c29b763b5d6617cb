"""fairseq's `simple_kmeans` model, a joblib file of scikit-learn's, into a codebook (SPEC 3.4)."""

from typing import Any

import numpy as np
import torch

from speechgpt.interop.allowed import KMEANS
from speechgpt.interop.errors import ConversionError
from speechgpt.interop.pickles import Record
from speechgpt.speech.codebook import Codebook


def is_kmeans(content: Any) -> bool:
    return isinstance(content, Record) and KMEANS.fullmatch(content.kind) is not None


def from_sklearn(content: Record, where: str, width: int | None = None) -> Codebook:
    """The centroids of a fitted k-means. width: dimensions of the encoder whose features it is to cluster.

    content: what `checkpoints.read` gives. where: the file's name, for errors. Raises ConversionError for a model that
    was not fitted, has numbers that are none, or another width.
    """
    state = content.state if isinstance(content.state, dict) else {}
    centres = state.get("cluster_centers_")
    if not isinstance(centres, np.ndarray) or centres.ndim != 2 or centres.dtype.kind != "f" or not centres.size:
        raise ConversionError(
            f"{where}: a {content.kind} without cluster_centers_ [K, D]: it was saved before it was fitted"
        )
    if not np.isfinite(centres).all():
        raise ConversionError(f"{where}: cluster_centers_ has values that are no numbers")
    clusters, dimensions = centres.shape
    if (said := state.get("n_clusters", clusters)) != clusters:
        raise ConversionError(
            f"{where}: n_clusters is {said!r:.20} and there are {clusters} centres: the file was changed"
        )
    if width is not None and dimensions != width:
        raise ConversionError(
            f"{where}: a k-means of {dimensions} dimensions; the encoder's features have {width}. It was fitted on "
            "another model's features"
        )
    return Codebook(torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32)))
