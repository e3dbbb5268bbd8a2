"""How tight each cluster is: the per-prototype temperature of ProtoNCE."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pcl_fast.clustering.backends import pick_sums
from pcl_fast.distributed import all_reduce_sum


@torch.no_grad()
def concentration(
    distance: torch.Tensor,
    assignment: torch.Tensor,
    k: int,
    *,
    temperature: float,
    alpha: float = 10.0,
    clip: tuple[float, float] = (10, 90),
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Estimate the concentration of every cluster (equation 12 of the paper).

    phi_c = sum_z |v'_z - c|_2 / (Z log(Z + alpha)), where Z is the number of points of cluster c. A cluster with at
    most one point takes the largest phi of the others. Then phi is clipped to percentiles of itself and scaled to have
    the mean `temperature`. Where the formula gives phi = 0 (a cluster of identical points), which would make logits
    infinite, the prototype takes the smallest positive phi; if there is none, all take `temperature`.

    Args:
        distance: [n_local] float32, each point's squared L2 distance to its centroid as k-means left it (not
            normalised).
        assignment: [n_local] integer in [0, k).
        k: number of clusters.
        temperature: tau, the mean of the result.
        alpha: smoothing, which keeps small clusters from getting a large phi.
        clip: lower and upper percentile.
        group: the ranks that hold the shards; None for this process alone.

    Returns:
        [k] float32, positive, on the device of `distance`.

    Raises:
        ValueError: distance and assignment differ in shape, or a parameter is out of its range.
    """
    if distance.shape != assignment.shape or distance.ndim != 1:
        raise ValueError(
            f"distance and assignment must be [n], got {list(distance.shape)} and {list(assignment.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= clip[0] <= clip[1] <= 100:
        raise ValueError(f"clip must be two percentiles in order, got {clip}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}: log(Z + alpha) is to stay above zero")

    sums, counts = _sums_and_counts(distance.sqrt(), assignment, k)
    all_reduce_sum(sums, group)
    all_reduce_sum(counts, group)

    phi = sums / (counts * torch.log(counts + alpha)).clamp(min=1e-300)
    phi = torch.where(counts > 1, phi, torch.where(counts > 1, phi, 0.0).max())
    low, high = torch.quantile(phi, torch.tensor(clip, dtype=phi.dtype, device=phi.device) / 100)
    phi = phi.clamp(low, high)
    positive = torch.where(phi > 0, phi, torch.inf).min()
    phi = torch.where(positive.isinf(), 1.0, phi.clamp(min=positive))
    return (phi * (temperature / phi.mean())).float()


def _sums_and_counts(values: torch.Tensor, assignment: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of `values` and the number of points in every cluster, [k] float64 and [k] int64."""
    if values.is_cuda:
        sums, counts = pick_sums(values.device)(values[:, None], assignment, k)
        return sums[:, 0].double(), counts
    return torch.bincount(assignment, values.double(), minlength=k), torch.bincount(assignment, minlength=k)
