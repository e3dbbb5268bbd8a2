"""The ranks of a run, and the few collectives that training needs. Everything works on a single process too."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pcl_fast.errors import UserError

T = TypeVar("T")

# One rank may keep the others waiting for long: AMI at ImageNet's size, a slow disk.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among the ranks. `group` is None when it is alone."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def connect() -> World:
    """Join the process group that torchrun describes in the environment, or stand alone without torchrun.

    Raises:
        ValueError: more ranks than GPUs on this machine.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()} here; "
            'use --nproc-per-node of at most that, or CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device, None)
    if not dist.is_initialized():
        # Of high priority: sums are to travel while k-means searches, not after it has filled the GPU.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT, pg_options=options)
    return World(dist.get_rank(), size, device, dist.group.WORLD)


def disconnect(world: World) -> None:
    if world.group is not None:
        dist.destroy_process_group()


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

    def read() -> Any:
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


def gather_objects(item: Any, world: World) -> list[Any]:
    """Every rank's `item` (picklable), in rank order, on all ranks."""
    if world.group is None:
        return [item]
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item, group=world.group)
    return items


def main_first(work: Callable[[], T], world: World) -> T:
    """work() on the main rank and then on all others, which find what it has left; returns each rank's own result.

    Raises:
        UserError, ValueError, OSError: what work() raised on the main rank, on every rank; the others then do not call
            it.
    """
    result, error = None, None
    if world.is_main:
        try:
            result = work()
        except (UserError, ValueError, OSError) as raised:
            error = raised
    shared = gather_objects(error, world)[0]
    if shared is not None:
        raise error or shared  # the main rank's own knows where it came from
    return result if world.is_main else work()
