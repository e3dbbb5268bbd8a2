"""Sinkhorn-Knopp: assignments of images to prototypes in which every prototype has the same share (Cuturi 2013), as
SwAV makes its codes (Caron et al., NeurIPS 2020, equation 3).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from pcl_fast.distributed import all_gather_rows, all_reduce_sum

# Iterations between two products of the matrix with its factors. A factor grows by at most B K in each, for B images
# over all ranks: after three of them, with a million images and 10,000 prototypes, it is at most 1e30.
_APART = 3


@torch.no_grad()
def sinkhorn(
    scores: torch.Tensor, *, epsilon: float, iterations: int, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The codes of images: Q = diag(v) exp(scores / epsilon) diag(u), whose rows sum to 1 and, the more iterations the
    better, whose columns have equal sums. An iteration divides every column by its sum over the images of all ranks,
    then every row by its sum.

    Nothing overflows, and no row or column becomes nothing, however large scores / epsilon is: the first iteration is
    made of logarithms. After it every column has an entry of 1 / (images x prototypes) or more, and the matrix stays as
    it is while u and v are made of its products with vectors.

    Args:
        scores: [N, K] of this rank's images for all prototypes, floating point; computed in float32 (float64 for
            float64 scores), under autocast too. Ranks may have different numbers of images.
        epsilon: > 0; the smaller, the nearer the codes are to 0 and 1.
        iterations: >= 1.
        group: the ranks; None for this process alone. One exchange of K numbers an iteration.

    Returns:
        [N, K] float32 (float64 for float64 scores), without a gradient. The number of ranks changes its rounding alone.

    Raises:
        ValueError: scores that are no matrix of floating point numbers, epsilon that is not positive, or less than one
            iteration.
    """
    _check(scores, epsilon, iterations)
    with torch.autocast(scores.device.type, enabled=False):
        scaled = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
        of_columns = all_gather_rows(scaled.logsumexp(0)[None], group).logsumexp(0)
        codes = scaled.sub_(of_columns).softmax(1)
        for begin in range(1, iterations, _APART):
            codes = _iterate(codes, min(_APART, iterations - begin), group)
        return codes


def _iterate(codes: torch.Tensor, iterations: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Some iterations of a matrix whose rows sum to 1, which is overwritten: two products with a vector each."""
    rows = codes.new_ones(len(codes))
    for _ in range(iterations):
        columns = all_reduce_sum(rows @ codes, group).reciprocal_()
        rows = (codes @ columns).reciprocal_()
    return codes.mul_(columns).mul_(rows[:, None])


def _check(scores: torch.Tensor, epsilon: float, iterations: int) -> None:
    if scores.ndim != 2 or not scores.is_floating_point() or not scores.numel():
        raise ValueError(f"scores must be [N, K] floating point, not empty, got {list(scores.shape)} {scores.dtype}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
