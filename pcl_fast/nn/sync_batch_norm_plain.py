"""The three of PyTorch's operations under its own SyncBatchNorm, which exist for GPUs alone, for any device.

Shapes: x and dy [N, C, ...]; weight, bias, mean and invstd [C], weight and bias None if there are none. Everything is
computed in mean's dtype; what is as large as x is returned in x's.
"""

from __future__ import annotations

import torch


def batch_norm_elemt(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """(x - mean) invstd weight + bias; eps is in invstd already."""
    y = (x - _channels(mean, x)) * _channels(_times(invstd, weight), x)
    return (y if bias is None else y + _channels(bias, x)).to(x.dtype)


def batch_norm_backward_reduce(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    *_needed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over all but the channels, [C] each: of dy, of dy (x - mean), and the gradients of weight and bias."""
    dims = [0, *range(2, x.ndim)]
    dy = dy.to(mean.dtype)
    sum_dy, sum_dy_xmu = dy.sum(dims), (dy * (x - _channels(mean, x))).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    sum_dy: torch.Tensor,
    sum_dy_xmu: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """The gradient of x, given both sums over all ranks, and how many values of a channel each of them has."""
    total = count.sum()
    shift, slope = sum_dy / total, invstd**2 * sum_dy_xmu / total
    dx = dy - _channels(shift, x) - (x - _channels(mean, x)) * _channels(slope, x)
    return (dx * _channels(_times(invstd, weight), x)).to(x.dtype)


def _times(invstd: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return invstd if weight is None else invstd * weight


def _channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[C] so that it goes with x."""
    return values.view(-1, *[1] * (x.ndim - 2))
