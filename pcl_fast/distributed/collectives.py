"""What ranks tell each other while they compute. Everything works on a single process too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def shard_bounds(total: int, rank: int, size: int) -> tuple[int, int]:
    """Rank's half-open range of `total` items in order; ranges differ in length by at most one."""
    return total * rank // size, total * (rank + 1) // size


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks, in place; returns `tensor`."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def begin_all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> Callable[[], Any]:
    """Sum over the ranks, in place, while other work goes on; call what is returned before the sums are used.

    On a GPU that call makes the work enqueued after it wait for the sums, not the host.
    """
    if group is None:
        return lambda: None
    return dist.all_reduce(tensor, group=group, async_op=True).wait


def begin_to_read(
    values: Callable[[], torch.Tensor], wait: Callable[[], Any], device: torch.device
) -> Callable[[], Any]:
    """Bring values() to the host when `wait` (see above) has been called; call what is returned for their list.

    On a GPU this goes on beside the work that is enqueued meanwhile: the host gets the values as soon as they are
    there, and the GPU need not run dry until it has seen them. What is enqueued after the call sees what `wait` is for.
    What `values` and `wait` refer to is kept until then: freed before, its memory would be given to work that waits
    neither for the sums nor for the copy.
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
    """Of high priority: a search fills the GPU for as long as it runs."""
    return torch.cuda.Stream(device, priority=-1)


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The rows [n_r, ...] of all ranks, one after another, when every rank has equally many.

    For unequal shards see `all_gather_shards`.
    """
    if group is None:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.cat(parts)


def all_gather_shards(shard: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The shards [n_r, ...] of all ranks, one after another; lengths may differ."""
    if group is None:
        return shard
    lengths = shard_lengths(len(shard), group, shard.device)
    padded = shard.new_zeros((max(lengths), *shard.shape[1:]))
    padded[: len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def shard_lengths(length: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """How many rows each rank of the group holds, in rank order."""
    if group is None:
        return [length]
    mine = torch.tensor([length], device=device)
    return all_gather_rows(mine, group).tolist()
