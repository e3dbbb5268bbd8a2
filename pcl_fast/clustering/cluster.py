"""The E-step on given features: k-means, concentration and prototypes for every granularity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pcl_fast.clustering.concentration import concentration
from pcl_fast.clustering.kmeans import kmeans
from pcl_fast.clustering.types import PrototypeSet
from pcl_fast.distributed import all_gather_shards


@torch.no_grad()
def cluster(
    features: torch.Tensor,
    ks: Sequence[int],
    *,
    temperature: float,
    iterations: int = 20,
    redo: int = 1,
    alpha: float = 10.0,
    clip: tuple[float, float] = (10, 90),
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> list[PrototypeSet]:
    """Cluster the features of all ranks once for every k in `ks`.

    Args:
        features: [n_local, d] float32, this rank's shard; the data set is the ranks' shards one after another.
        ks: numbers of clusters.
        temperature: tau, the mean concentration.
        iterations, redo, seed, group, backend: see `kmeans`; granularity m draws with seed + m * redo.
        alpha, clip: see `concentration`.

    Returns:
        One PrototypeSet per k, the same on every rank, with the assignment of the whole data set.

    Raises:
        ValueError: see `kmeans` and `concentration`.
    """
    sets = []
    for m, k in enumerate(ks):
        result = kmeans(
            features, k, iterations=iterations, redo=redo, seed=seed + m * redo, group=group, backend=backend
        )
        phi = concentration(
            result.distance,
            result.assignment,
            k,
            temperature=temperature,
            alpha=alpha,
            clip=clip,
            group=group,
        )
        centroids = F.normalize(result.centroids, dim=1)
        sets.append(PrototypeSet(centroids, phi, all_gather_shards(result.assignment, group)))
    return sets
