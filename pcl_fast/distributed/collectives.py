"""The tensors that ranks exchange while they compute. All functions work for a single process too (group = None)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pcl_fast.distributed.between import between_graphs


def shard_bounds(total: int, rank: int, size: int) -> tuple[int, int]:
    """Return the half-open range of a rank's share of `total` items; shares differ in length by at most one."""
    return total * rank // size, total * (rank + 1) // size


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Replace `tensor` by its sum over the ranks, in place, and return it."""
    if group is not None:
        between_graphs(lambda: dist.all_reduce(tensor, group=group))
    return tensor


def begin_all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> Callable[[], Any]:
    """Begin to replace `tensor` by its sum over the ranks, in place; return a function that waits for the sums.

    Other work may go on until that function is called, which must be before the sums are used. On a GPU it makes the
    work that is enqueued after it wait, not the host.
    """
    if group is None:
        return lambda: None
    return dist.all_reduce(tensor, group=group, async_op=True).wait


def begin_to_read(
    values: Callable[[], torch.Tensor], wait: Callable[[], Any], device: torch.device
) -> Callable[[], Any]:
    """Begin to copy values() to the host as soon as sums have arrived; return a function that returns them as a list.

    On a GPU the copy runs on a stream of its own, beside the work that is enqueued in the meantime: the host gets the
    values early, and the GPU has work while the host looks at them. Work that is enqueued after the returned function
    was called sees the sums.

    Everything that `values` and `wait` refer to is kept until that function has returned. If it were freed earlier, its
    memory could go to work that waits neither for the sums nor for the copy.

    Args:
        values: computes the tensor to copy, from the sums.
        wait: waits for the sums; what `begin_all_reduce_sum` has returned.
        device: the device of the values.
    """
    if device.type != "cuda":
        return lambda: (wait(), values().tolist())[1]
    stream, beside = torch.cuda.current_stream(device), _second_stream(device)
    beside.wait_stream(stream)
    with torch.cuda.stream(beside):
        wait()
        found = values()
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        event = beside.record_event()

    def read(_kept: tuple = (values, wait, found)) -> Any:
        event.synchronize()
        stream.wait_event(event)
        return host.tolist()

    return read


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of high priority on this device, always the same. With a lower one the copy would wait for
    k-means, which fills the GPU for as long as a search runs.
    """
    return torch.cuda.Stream(device, priority=-1)


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the rows [n_r, ...] of all ranks, one after another, if every rank has equally many.

    For shards of unequal lengths there is `all_gather_shards`.
    """
    if group is None:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    between_graphs(lambda: dist.all_gather(parts, rows, group=group))
    return torch.cat(parts)


def all_gather_with_gradient(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`all_gather_rows` of [N, ...], differentiable: [G N, ...] for G ranks with N rows each.

    The gradient of a rank's rows is the sum of what flows back into them on all ranks: that of the sum of all ranks'
    losses. Every rank has to go through the backward pass.
    """
    return rows if group is None else _AllGather.apply(rows, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.length = group, len(rows)
        return all_gather_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # All of it, for gloo has no reduce-scatter. In a copy: others may hold this gradient too.
        gradient = all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format), ctx.group)
        return gradient[dist.get_rank(ctx.group) * ctx.length :][: ctx.length], None


def all_gather_shards(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the shards [n_r, ...] of all ranks, one after another; lengths may differ."""
    if group is None:
        return shard
    lengths = shard_lengths(len(shard), group, shard.device)
    padded = shard.new_zeros((max(lengths), *shard.shape[1:]))
    padded[: len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def shard_lengths(length: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Return how many rows each rank of the group holds, in rank order; `length` is this rank's."""
    if group is None:
        return [length]
    mine = torch.tensor([length], device=device)
    return all_gather_rows(mine, group).tolist()
