"""PCA-whitening of features of which each rank holds its own shard."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pcl_fast.distributed import all_reduce_sum

# Of the largest variance: directions with less are divided as if they had so much. What is left there may be rounding,
# which would otherwise become as loud as the rest: an entry x in float16 is wrong by up to x / 2048, which in unit
# features of d entries is a variance of about 1e-7 / d in every direction.
_LEAST_VARIANCE = 1e-6
# Entries of a chunk in float64: 32 MB.
_CHUNK = 1 << 22


class Whitening(NamedTuple):
    """A linear map to uncorrelated entries of variance 1.

    mean: [d] float64, of all features.
    projection: [d, k] float64: the principal directions by their variance, the largest first, each divided by the
        square root of it. Of each direction the entry of the largest size is positive.
    """

    mean: torch.Tensor
    projection: torch.Tensor

    def apply(self, features: torch.Tensor, *, unit: bool = False) -> torch.Tensor:
        """The whitened features, [n, k] in their own dtype, computed in float32 (float64 for float64).

        unit: divide each row by its length (before it is rounded to its dtype), as DeepCluster does.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        mean, projection = self.mean.to(dtype), self.projection.to(dtype)
        result = features.new_empty(len(features), projection.shape[1])
        for rows, out in _chunks(features, result):
            whitened = (rows.to(dtype) - mean) @ projection
            out.copy_(F.normalize(whitened, dim=1) if unit else whitened)
        return result


@torch.no_grad()
def pca_whitening(features: torch.Tensor, dim: int, *, group: dist.ProcessGroup | None = None) -> Whitening:
    """Find the map that whitens the features of all ranks and keeps their `dim` principal directions.

    Mean and covariance (with 1/n) are summed over the ranks in float64, the covariance from differences to the mean,
    which does not cancel. One rank finds the directions, and all take up the same bits.

    A direction whose variance is below a millionth of the largest is divided as if it had that: what is left there is
    rounding, and features that do not fill `dim` directions (or images that are fewer) have nothing in the others.

    Args:
        features: [n_local, d] float, this rank's shard; shards may differ in length and be empty.
        dim: how many directions, at most d and at most the number of images on all ranks.
        group: the ranks that hold the shards; None for this process alone.

    Raises:
        ValueError: on all ranks: a wrong shape or dtype, more directions than entries or images, or features that are
            not finite.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features must be [n, d] floating point, got {list(features.shape)} {features.dtype}")
    mean, images = _mean(features, group)
    if not 1 <= dim <= min(features.shape[1], images):
        raise ValueError(
            f"cannot whiten {images} features of length {features.shape[1]} to {dim} dimensions; use 1 to "
            f"{min(features.shape[1], images)}"
        )
    covariance = _covariance(features, mean, group) / images
    # The same sums on all ranks, so all raise, or none.
    if not covariance.isfinite().all():
        raise ValueError("features cannot be whitened: some are not finite")
    projection = covariance.new_zeros(len(covariance), dim)
    if group is None or dist.get_rank(group) == 0:
        projection.copy_(_directions(covariance, dim))
    # All ranks but one add 0: other machines might round, and turn directions, otherwise.
    return Whitening(mean, all_reduce_sum(projection, group))


def _mean(features: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """The mean of all ranks' features, [d] float64, and how many they are."""
    totals = features.new_zeros(features.shape[1] + 1, dtype=torch.float64)
    for (rows,) in _chunks(features):
        totals[:-1] += rows.sum(0, dtype=torch.float64)
    totals[-1] = len(features)
    all_reduce_sum(totals, group)
    return totals[:-1] / totals[-1].clamp(min=1), int(totals[-1])


def _covariance(features: torch.Tensor, mean: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over all ranks' features of (x - mean)(x - mean)^T, [d, d] float64."""
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for (rows,) in _chunks(features):
        centred = rows.double() - mean
        total.addmm_(centred.T, centred)
    return all_reduce_sum(total, group)


def _directions(covariance: torch.Tensor, dim: int) -> torch.Tensor:
    """Whitening.projection of a covariance; zeros if nothing varies."""
    variance, directions = torch.linalg.eigh(covariance)  # ascending
    variance, directions = variance[-dim:].flip(0), directions[:, -dim:].flip(1)
    if variance[0] <= 0:
        return torch.zeros_like(directions)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign() / variance.clamp(min=_LEAST_VARIANCE * float(variance[0])).sqrt()


def _chunks(*tensors: torch.Tensor):
    """Consecutive rows of the tensors together, few enough for temporary copies."""
    return zip(*(tensor.split(max(1, _CHUNK // tensors[0].shape[1])) for tensor in tensors), strict=True)
