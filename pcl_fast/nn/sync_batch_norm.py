"""Batch norm with the statistics of all ranks' batches together.

For methods that contrast the images of a batch with each other: both views of an image are on one rank, and statistics
of that rank's own would tell them from the images of other ranks, without a look at what they show (Chen et al. 2020,
section 2.2). PyTorch's own SyncBatchNorm refuses CPU tensors.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from pcl_fast.distributed import all_gather_rows, all_reduce_sum
from pcl_fast.nn import sync_batch_norm_plain
from pcl_fast.nn.batch_norm import with_activation


class Statistics(NamedTuple):
    """Of the values of all ranks together: mean [C] and biased variance [C]; and how many values of a channel each
    rank has, [number of ranks]. All in float32, or float64 for float64 values.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    counts: torch.Tensor


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training, batch norm of the rows of all ranks in `group` as if they were one batch.

    Ranks may hold different numbers of rows, but at least one each. The running statistics are the same on all of them.
    Parameters get the gradients of a rank's own rows, for DistributedDataParallel to average. In eval mode, and without
    a group, this is the batch norm that it was made of, whose state it has.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.group is None:
            return super().forward(x)
        self._check_input_dim(x)
        y, statistics = normalise(x, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats:
            self._track(statistics)
        return y

    @torch.no_grad()
    def _track(self, statistics: Statistics) -> None:
        """Running statistics as PyTorch's: the variance unbiased; without a momentum, the mean of all batches."""
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        count = statistics.counts.sum()
        self.running_mean.lerp_(statistics.mean, share)
        self.running_var.lerp_(statistics.variance * (count / (count - 1)), share)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.group)] = self.group  # of the same ranks: a group cannot be copied
        duplicate = memo[id(self)] = self.__class__.__new__(self.__class__)
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """[N, C] or [N, C, L]."""


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """[N, C, H, W]."""


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """[N, C, H, W], for timm's batch norm that its activation is a part of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


_SYNCHRONISED = {nn.BatchNorm1d: SyncBatchNorm1d, nn.BatchNorm2d: SyncBatchNorm2d}


def sync_batch_norm(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Make every nn.BatchNorm1d and nn.BatchNorm2d in the module, and timm's BatchNormAct2d, a SyncBatchNorm;
    parameters and buffers stay as they are.

    Raises:
        ValueError: there is batch norm of another kind.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.__class__ = _synchronised(part)
            part.group = group


def _synchronised(norm: nn.Module) -> type[SyncBatchNorm]:
    if isinstance(norm, SyncBatchNorm):
        return type(norm)
    if with_activation(norm):
        return SyncBatchNormAct2d
    if type(norm) not in _SYNCHRONISED:
        raise ValueError(
            f"--model.sync-bn does not know the network's {type(norm).__name__}; use another --model.arch or "
            "--model.no-sync-bn"
        )
    return _SYNCHRONISED[type(norm)]


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, Statistics]:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, mean and variance being those of all ranks' values.

    One collective here and one in the backward pass; none waits for the device.

    Args:
        x: [N, C, ...] of any floating dtype; y is of that dtype and in x's memory format.
        weight, bias: [C] in float32 (float64 for float64 x), or None.

    Differentiable in x, through the statistics on all ranks, and in weight and bias, for this rank's own values.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    statistics = _statistics(x, group)
    return _Normalise.apply(x, weight, bias, *statistics, eps, group), statistics


@torch.no_grad()
def _statistics(x: torch.Tensor, group: dist.ProcessGroup | None) -> Statistics:
    """Means and variances of the ranks, combined as by Chan et al. 1979: nothing is the difference of large sums."""
    if not x.is_cuda:  # a GPU takes half precision as it is, and sums it up in float32
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    count = mean.new_full((1,), x.numel() // x.shape[1])
    ranks = all_gather_rows(torch.cat([mean, variance, count])[None], group)
    means, variances, counts = ranks.split([len(mean), len(mean), 1], dim=1)
    share = counts / counts.sum()
    # By its distance from one of them, which is small where the mean is large.
    mean = means[0] + (share * (means - means[0])).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    return Statistics(mean, variance, counts.flatten())


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        counts: torch.Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        invstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.group = group
        return _operations(x).batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        operations = _operations(x)
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        *sums, d_weight, d_bias = operations.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
        sums = all_reduce_sum(torch.cat(sums), ctx.group).chunk(2)
        dx = operations.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, counts.int())
        _, needs_weight, needs_bias, *rest = ctx.needs_input_grad
        return dx, d_weight if needs_weight else None, d_bias if needs_bias else None, *[None] * len(rest)


def _operations(x: torch.Tensor) -> Any:
    """PyTorch's fused ones where they exist."""
    return torch if x.is_cuda else sync_batch_norm_plain
