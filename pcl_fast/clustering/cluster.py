"""The E-step on given features: k-means, concentration and prototypes for every granularity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pcl_fast.clustering.backends import pick_backend
from pcl_fast.clustering.concentration import concentration
from pcl_fast.clustering.kmeans import check_clusters, check_options, check_shards
from pcl_fast.clustering.lloyd import lloyd, take_turns
from pcl_fast.clustering.splits import Split
from pcl_fast.clustering.types import PrototypeSet
from pcl_fast.distributed import all_gather_shards


@torch.no_grad()
def cluster(
    features: torch.Tensor | np.ndarray,
    ks: Sequence[int],
    *,
    temperature: float,
    iterations: int = 20,
    redo: int = 1,
    alpha: float = 10.0,
    clip: tuple[float, float] = (10, 90),
    fixed_concentration: bool = False,
    seed: int = 0,
    init: Sequence[torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    split_by: Split = "spread",
    prune_after: int | None = None,
) -> list[PrototypeSet]:
    """Cluster the features of all ranks once for every k in `ks`.

    The granularities take turns: while the sums of one are on their way between the ranks, the others assign points.

    Args:
        features: [n_local, d] float32 or float16, this rank's shard; the data set is the shards of all ranks, one after
            another.
        ks: numbers of clusters, one per granularity.
        temperature: tau, the mean concentration.
        fixed_concentration: give every prototype the concentration tau, instead of an estimate.
        iterations, redo, seed, group, backend, split_by, prune_after: see `kmeans`; granularity m draws with seed + m *
            redo.
        init: initial centroids [k, d] of every granularity, see `kmeans`.
        alpha, clip: see `concentration`.

    Returns:
        One PrototypeSet per k, the same on every rank, with the assignment of the whole data set.

    Raises:
        ValueError, TypeError: see `kmeans` and `concentration`; or init does not have one entry per k.
    """
    if init is not None and len(init) != len(ks):
        raise ValueError(f"init must be one [k, d] for each of the {len(ks)} ks, got {len(init)}")
    options = check_options(iterations, redo, split_by, prune_after)
    shards = check_shards(features, group)
    starts = [None] * len(ks) if init is None else init
    ks = [check_clusters(shards, k, start, redo) for k, start in zip(ks, starts, strict=True)]
    features = shards.features
    picked = pick_backend(backend, features.device, features.dtype, features.shape[1])
    results = take_turns(
        [
            lloyd(shards, k, picked, seed=seed + m * redo, init=start, options=options)
            for m, (k, start) in enumerate(zip(ks, starts, strict=True))
        ]
    )
    sets = []
    for k, (centroids, assignment, distance, _) in zip(ks, results, strict=True):
        phi = concentration(distance, assignment, k, temperature=temperature, alpha=alpha, clip=clip, group=group)
        if fixed_concentration:
            phi = torch.full_like(phi, temperature)
        sets.append(PrototypeSet(F.normalize(centroids, dim=1), phi, all_gather_shards(assignment, group)))
    return sets


def cluster_row(k: int, assignment: torch.Tensor) -> dict[str, Any]:
    """Return what metrics record of an assignment [n] to k clusters: k, the number of empty clusters, and the deciles
    of the clusters' sizes.
    """
    sizes = torch.bincount(assignment, minlength=k).float()
    deciles = torch.quantile(sizes, torch.linspace(0, 1, 11, device=sizes.device)).tolist()
    return {"k": k, "empty": int((sizes == 0).sum()), "size_deciles": deciles}
