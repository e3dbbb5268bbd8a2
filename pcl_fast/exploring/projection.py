"""The images in the plane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

from pcl_fast.evaluation.tsne import embed
from pcl_fast.exploring.knowledge import Knowledge

# t-SNE looks at three times as many neighbours; of fewer images the plane of most variance is drawn.
_PERPLEXITY = 30.0
_LEAST = 3 * int(_PERPLEXITY) + 2
# Positions are whole numbers up to this one.
SIDE = 10_000
# Half of the usual number: the groups are in place, and 20,000 images take minutes on a CPU.
_ITERATIONS = 500


@dataclass(frozen=True)
class Projection:
    """Images on a map.

    images: int64 [m], those that are on it.
    positions: int64 [m, 2], within a square of SIDE.
    prototypes: for every granularity int64 [k, 2], the median position of a cluster's images, -1 where none is on the
        map.
    how: what drew it, in words.
    """

    images: np.ndarray
    positions: np.ndarray
    prototypes: tuple[np.ndarray, ...]
    how: str


def project(known: Knowledge, most: int, seed: int = 0) -> Projection:
    """Map images to the plane: all, or `most` evenly spaced ones."""
    images = np.unique(np.linspace(0, len(known.paths) - 1, min(most, len(known.paths))).round().astype(np.int64))
    features = known.features.cpu().numpy()[images]
    if len(features) < _LEAST:
        flat = PCA(2).fit_transform(features)
        how = "their two principal components"
    else:
        flat, how = (
            embed(features, perplexity=_PERPLEXITY, iterations=_ITERATIONS, seed=seed),
            "t-SNE of their features",
        )
    low, high = flat.min(0), flat.max(0)
    span = max(float((high - low).max()), 1e-12)
    centred = (flat - (low + high) / 2) / span + 0.5
    positions = (centred * (SIDE - 1)).round().astype(np.int64)
    prototypes = tuple(
        _medians(granularity.assignment[images], positions, granularity.k) for granularity in known.granularities
    )
    return Projection(images, positions, prototypes, how)


def _medians(assignment: np.ndarray, positions: np.ndarray, k: int) -> np.ndarray:
    found = np.full((k, 2), -1)
    order = np.argsort(assignment, kind="stable")
    clusters, begins = np.unique(assignment[order], return_index=True)
    for cluster, members in zip(clusters, np.split(order, begins[1:]), strict=True):
        found[cluster] = np.median(positions[members], axis=0)
    return found
