from typing import Any

import numpy as np
import pytest

from speechgpt.interop.errors import ConversionError
from speechgpt.interop.kmeans import from_sklearn, is_kmeans
from speechgpt.interop.pickles import Record

CENTRES = np.arange(12, dtype=np.float64).reshape(3, 4)


def model(**state: Any) -> Record:
    return Record(
        "sklearn.cluster.k_means_.MiniBatchKMeans", state={"n_clusters": 3, "cluster_centers_": CENTRES, **state}
    )


def test_the_centres_become_the_codebook() -> None:
    codebook = from_sklearn(model(), "km.bin", width=4)
    assert codebook.centroids.tolist() == CENTRES.tolist()
    assert is_kmeans(model())
    assert not is_kmeans(Record("argparse.Namespace"))


@pytest.mark.parametrize(
    ("state", "width", "reason"),
    [
        ({}, 768, "a k-means of 4 dimensions; the encoder's features have 768"),
        ({"cluster_centers_": None}, None, "before it was fitted"),
        ({"cluster_centers_": np.zeros((3, 4), np.int64)}, None, "before it was fitted"),
        ({"cluster_centers_": np.zeros(4)}, None, "before it was fitted"),
        ({"cluster_centers_": np.full((3, 4), np.nan)}, None, "no numbers"),
        ({"n_clusters": 1000}, None, "n_clusters is 1000 and there are 3"),
    ],
)
def test_what_does_not_fit_is_named(state: dict, width: int | None, reason: str) -> None:
    with pytest.raises(ConversionError, match=f"km.bin: .*{reason}"):
        from_sklearn(model(**state), "km.bin", width)
