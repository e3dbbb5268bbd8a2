"""Distributed k-means: Lloyd's algorithm over shards that stay where they are.

Each iteration every rank assigns its own points, and only the centroids' sums and counts (k d + k floats) are summed
over the ranks. Start, empty clusters and restarts are decided from numbers that all ranks hold alike, so one rank or
several give the same clustering up to rounding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pcl_fast.clustering.nearest import Nearest, pick_nearest
from pcl_fast.clustering.types import KMeansResult
from pcl_fast.distributed import all_gather_rows, all_reduce_sum
from pcl_fast.seeds import mix_seeds

# A cluster is split by moving its two halves apart by this factor, as faiss does.
_SPLIT = 1 / 1024


@torch.no_grad()
def kmeans(
    features: torch.Tensor,
    k: int,
    *,
    iterations: int = 20,
    redo: int = 1,
    seed: int = 0,
    init: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> KMeansResult:
    """Minimise sum_i min_j |x_i - c_j|^2 by Lloyd's algorithm (Euclidean; centroids are not normalised).

    Args:
        features: [n_local, d] float32, this rank's shard; shards may differ in length and be empty.
        k: number of clusters, at most the number of points of all ranks together.
        iterations: updates of the centroids; the labels are then those of the centroids returned.
        redo: starts; the result with the least objective is kept. Start r draws with seed + r.
        seed: of the start (k distinct points) and of splitting. The same on every rank.
        init: [k, d] initial centroids instead of random points; redo must be 1.
        group: the ranks that hold the shards, None for this process alone.
        backend: "torch", "faiss", or "auto", which is "torch".

    Returns:
        KMeansResult, on the device of `features`.

    Raises:
        ValueError: wrong shape, dtype, k, init or backend, or (on every rank) NaN or infinite features on some rank.
        MissingPackageError: the backend is not installed.
    """
    lengths = _check(features, k, iterations, redo, init, group)
    nearest = pick_nearest(backend)
    best: KMeansResult | None = None
    for start in range(redo):
        centroids = _draw_points(features, k, lengths, seed + start, group) if init is None else init.clone()
        for iteration in range(iterations):
            centroids = _update(
                features, nearest(features, centroids), centroids, mix_seeds(seed + start, iteration), group
            )
        result = _label(features, centroids, nearest, group)
        if best is None or result.objective < best.objective:
            best = result
    return best


def _check(features, k, iterations, redo, init, group) -> list[int]:
    """Validate; returns the shards' lengths in rank order."""
    if features.ndim != 2 or features.dtype != torch.float32 or not features.is_contiguous():
        raise ValueError(
            f"features must be [n, d] float32 and contiguous, got {list(features.shape)} {features.dtype} with strides "
            f"{features.stride()}"
        )
    broken = (~features.isfinite()).any(1).sum()
    mine = torch.stack([torch.full_like(broken, len(features)), broken])[None]
    lengths, broken_per_rank = all_gather_rows(mine, group).T.tolist()
    for rank, count in enumerate(broken_per_rank):
        if count:
            raise ValueError(f"features of rank {rank} are not finite: {count} of {lengths[rank]} rows")
    if not 1 <= k <= sum(lengths):
        raise ValueError(
            f"cannot make k = {k} clusters of {sum(lengths)} points; "
            f"set k (in training: --cluster.ks) between 1 and {sum(lengths)}"
        )
    if iterations < 1 or redo < 1:
        raise ValueError(f"iterations and redo must be at least 1, got {iterations} and {redo}")
    if init is not None:
        if init.shape != (k, features.shape[1]) or init.dtype != torch.float32:
            raise ValueError(f"init must be [{k}, {features.shape[1]}] float32, got {list(init.shape)} {init.dtype}")
        if redo != 1:
            raise ValueError(f"with init every start would be the same: redo must be 1, got {redo}")
    return lengths


def _draw_points(features, k, lengths, seed, group) -> torch.Tensor:
    """k distinct points of all shards, chosen by their position in the whole: the same for any number of ranks."""
    rank = 0 if group is None else dist.get_rank(group)
    first = sum(lengths[:rank])
    chosen = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))[:k]
    mine = ((chosen >= first) & (chosen < first + lengths[rank])).nonzero().view(-1)
    centroids = features.new_zeros(k, features.shape[1])
    centroids[mine.to(features.device)] = features[(chosen[mine] - first).to(features.device)]
    return all_reduce_sum(centroids, group)


def _update(features, assignment, centroids, seed, group) -> torch.Tensor:
    """Means of the clusters; an empty one takes half of a large one's points."""
    k = len(centroids)
    sums = torch.zeros_like(centroids).index_add_(0, assignment, features)
    counts = torch.bincount(assignment, minlength=k)
    all_reduce_sum(sums, group)
    all_reduce_sum(counts, group)
    means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
    return _split_large(means, counts, seed)


def _split_large(centroids: torch.Tensor, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Give every empty cluster, and a large one drawn for it, the large one's centroid shifted to either side.

    As in faiss the chance to be split grows with the number of points beyond the first. Each cluster is split at
    most once an iteration; when there are more empty clusters than can be split, the rest stay empty.
    """
    empty = (counts == 0).nonzero().view(-1)
    if not len(empty):
        return centroids
    weight = (counts - 1).clamp(min=0).double().cpu()
    splits = min(len(empty), int((weight > 0).sum()))
    if splits == 0:
        return centroids
    donors = torch.multinomial(weight, splits, generator=torch.Generator().manual_seed(seed)).to(centroids.device)
    empty = empty[:splits]
    shift = torch.full((centroids.shape[1],), 1 + _SPLIT, device=centroids.device)
    shift[1::2] = 1 - _SPLIT
    centroids[empty] = centroids[donors] * shift
    centroids[donors] = centroids[donors] * (2 - shift)
    return centroids


def _label(features: torch.Tensor, centroids: torch.Tensor, nearest: Nearest, group) -> KMeansResult:
    """Assignment to these centroids, and distances summed from differences: |x|^2 + |c|^2 - 2 x.c would cancel."""
    assignment = nearest(features, centroids)
    distance = squared_distance(features, centroids, assignment)
    objective = all_reduce_sum(distance.sum(dtype=torch.float64), group)
    return KMeansResult(centroids, assignment.int(), distance, objective.item())


def squared_distance(features: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """|x_i - c_assignment(i)|^2, [n] float32, in chunks that keep the temporaries small."""
    chunk = max(1, (1 << 24) // features.shape[1])
    parts = [
        (rows - centroids[labels]).square_().sum(1)
        for rows, labels in zip(features.split(chunk), assignment.split(chunk), strict=True)
    ]
    return torch.cat(parts)
