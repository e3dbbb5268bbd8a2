"""Distributed k-means: Lloyd's algorithm over shards that never leave their ranks."""

from __future__ import annotations

import operator
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist

from pcl_fast.clustering.backends import pick_backend
from pcl_fast.clustering.lloyd import Options, Shards, lloyd, take_turns
from pcl_fast.clustering.splits import Split
from pcl_fast.clustering.types import KMeansResult
from pcl_fast.distributed import all_gather_rows


@torch.no_grad()
def kmeans(
    features: torch.Tensor | np.ndarray,
    k: int,
    *,
    iterations: int = 20,
    redo: int = 1,
    seed: int = 0,
    init: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    split_by: Split = "spread",
    prune_after: int | None = None,
    spherical: bool = False,
) -> KMeansResult:
    """Minimise sum_i min_j |x_i - c_j|^2 by Lloyd's algorithm (Euclidean; centroids are not normalised unless
    `spherical` says so).

    Args:
        features: [n_local, d] float32 or float16, contiguous, this rank's shard, a NumPy array perhaps; shards may
            differ in length and be empty. On a GPU the type decides the precision of the search: float16 is about three
            times as fast. Centroids, sums and distances are float32 either way.
        k: number of clusters, at most the number of points on all ranks. If fewer points are distinct, some clusters
            stay empty or share a centroid.
        iterations: how often the centroids are updated at most; the updates end early when no assignment changes. A
            cluster that has become empty takes half of another, see `split_by`.
        redo: number of starts, of which the result with the lowest objective is kept. Start r draws with seed + r.
        seed: decides the initial centroids (k distinct points), and draws by size. It must be the same on every rank.
        init: [k, d] float32, initial centroids instead of random points; redo must be 1.
        group: the ranks that hold the shards; None for this process alone.
        backend: what searches for the nearest centroid. "triton": the fused kernels (d up to 256; up to 128 on Volta,
            and for float32 on compute capability 10.x); "torch": chunked matrix products in float32; "faiss"; "auto":
            triton for CUDA tensors that it takes, torch elsewhere.
        split_by: which cluster gives half of itself to an empty one. "spread": the one with the largest sum of squared
            distances to its centroid; "size": one that is drawn, as in faiss, by its number of points.
        prune_after: after so many iterations only the start with the lowest objective goes on; None: all do.
        spherical: centroids are of unit length, those to start from too: every update scales the means to it (Dhillon
            and Modha 2001). It is meant for unit features, of which the objective is the sum of 2 - 2 cos; of others a
            unit centroid has the least sum of squared distances all the same.

    Returns:
        KMeansResult, on the device of `features`. Equal seeds and shards give equal bits (on a GPU, if Triton is
        installed); the same points in other shards give the same result up to rounding.

    Raises:
        ValueError: wrong shape, dtype, k, init (or NaN in it, or for spherical a row of length 0), backend or split_by,
            or (on every rank) NaN or infinite features on some rank.
        TypeError: features are no array, or a number is no integer.
        MissingPackageError: the backend is not installed.
    """
    options = check_options(iterations, redo, split_by, prune_after)._replace(spherical=spherical)
    shards = check_shards(features, group)
    k = check_clusters(shards, k, init, redo)
    if spherical and init is not None and not init.any(1).all():
        raise ValueError(f"init cannot be scaled to unit length: {int((~init.any(1)).sum())} of {k} rows are 0")
    features = shards.features
    picked = pick_backend(backend, features.device, features.dtype, features.shape[1])
    return take_turns([lloyd(shards, k, picked, seed=seed, init=init, options=options)])[0]


def check_options(iterations: int, redo: int, split_by: str, prune_after: int | None) -> Options:
    """
    Raises:
        ValueError, TypeError: see `kmeans`.
    """
    iterations, redo = _integer("iterations", iterations), _integer("redo", redo)
    if iterations < 1 or redo < 1:
        raise ValueError(f"iterations and redo must be at least 1, got {iterations} and {redo}")
    if split_by not in get_args(Split):
        raise ValueError(f'split_by must be "spread" or "size", got {split_by!r}')
    if prune_after is not None and _integer("prune_after", prune_after) < 1:
        raise ValueError(f"prune_after must be at least 1, or None, got {prune_after}")
    return Options(iterations, redo, split_by, prune_after)


def _integer(name: str, value: Any) -> int:
    """
    Raises:
        TypeError: the value is no integer, of Python's or another library's.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def check_shards(features: torch.Tensor | np.ndarray, group: dist.ProcessGroup | None) -> Shards:
    """Return the shards of all ranks, if they can be clustered, as tensors.

    Raises:
        ValueError: wrong shape, dtype or strides; or, on all ranks, features of one rank are not finite.
        TypeError: they are no array.
    """
    if isinstance(features, np.ndarray):
        # PyTorch warns of arrays that must not be written to, which nobody does here.
        features = torch.from_numpy(features if features.flags.writeable else features.copy())
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a tensor or a NumPy array, got {type(features).__name__}")
    if features.ndim != 2 or features.dtype not in (torch.float32, torch.float16) or not features.is_contiguous():
        raise ValueError(
            f"features must be [n, d] float32 or float16 and contiguous, got {list(features.shape)} {features.dtype} "
            f"with strides {features.stride()}"
        )
    if not features.shape[1]:
        raise ValueError(f"features must have a length of at least 1, got {list(features.shape)}")
    mine = torch.tensor([[len(features), _broken_rows(features)]], device=features.device)
    lengths, broken_per_rank = all_gather_rows(mine, group).T.tolist()
    for rank, count in enumerate(broken_per_rank):
        if count:
            raise ValueError(f"features of rank {rank} are not finite: {count} of {lengths[rank]} rows")
    return Shards(features, lengths, group)


def _broken_rows(features: torch.Tensor) -> int:
    """Return how many rows have a NaN or infinity. The extremes tell whether there are any; only then are they counted,
    which takes memory.
    """
    if not features.numel() or torch.stack(torch.aminmax(features)).isfinite().all():
        return 0
    return sum(int((~chunk.isfinite()).any(1).sum()) for chunk in features.split(1 << 16))


def check_clusters(shards: Shards, k: int, init: torch.Tensor | None, redo: int) -> int:
    """Return k, as Python's integer, if so many clusters can be made.

    Raises:
        ValueError: they cannot, or not from this `init`.
        TypeError: k is no integer.
    """
    k, points, d = _integer("k", k), sum(shards.lengths), shards.features.shape[1]
    if not 1 <= k <= points:
        raise ValueError(
            f"cannot make k = {k} clusters of {points} points; set k (in training: --cluster.ks) between 1 and {points}"
        )
    if init is None:
        return k
    if init.shape != (k, d) or init.dtype != torch.float32:
        raise ValueError(f"init must be [{k}, {d}] float32, got {list(init.shape)} {init.dtype}")
    if not init.isfinite().all():
        raise ValueError(f"init is not finite: {int((~init.isfinite()).any(1).sum())} of {k} rows")
    if redo != 1:
        raise ValueError(f"with init every start would be the same: redo must be 1, got {redo}")
    return k
