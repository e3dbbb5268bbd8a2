"""The mean of the ranks' gradients, after the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pcl_fast.distributed.collectives import all_reduce_sum


def average_gradients(parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Replace the gradients of all parameters that have one by their means over the ranks, in one all-reduce.

    The parameters are dense, and have one dtype and device; on all ranks the same ones have a gradient.
    """
    if group is None:
        return
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    # Each in its parameter's strides, in which the optimiser's fused operation wants it.
    lengths = [parameter.numel() for parameter in parameters]
    flat = parameters[0].new_empty(sum(lengths))
    means = [mean.as_strided(p.shape, p.stride()) for mean, p in zip(flat.split(lengths), parameters, strict=True)]
    torch._foreach_copy_(means, [parameter.grad for parameter in parameters])
    flat /= dist.get_world_size(group)
    all_reduce_sum(flat, group)
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean
