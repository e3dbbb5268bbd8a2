"""The ranks of a run, and the few collectives that training needs. Everything works on a single process too."""

from __future__ import annotations

import functools
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pcl_fast.errors import UserError
from pcl_fast.gpu import check_gpu, check_no_gpu

T = TypeVar("T")

# One rank may keep the others waiting for long: AMI at ImageNet's size, a slow disk.
_TIMEOUT = timedelta(hours=2)
# For all ranks to start Python and import PyTorch, perhaps from a network disk.
_TIME_TO_START = timedelta(minutes=15)
# What a user can mend, and all ranks are to hear of.
_FAULTS = (UserError, ValueError, OSError)


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
        ValueError: a rank has no GPU that it can use, or they would compute on different kinds of device; on all ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, _pick_device(), None)
    device = _pick_device() if dist.is_initialized() else _join()
    return World(dist.get_rank(), size, device, dist.group.WORLD)


def _pick_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none; looked at before anything uses it.

    Raises:
        ValueError: more ranks than GPUs on this machine, or a GPU that the installed stack cannot use.
    """
    if not torch.cuda.is_available():
        check_no_gpu()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()} here; "
            'use --nproc-per-node of at most that, or CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    device = torch.device("cuda", local_rank)
    check_gpu(device)
    torch.cuda.set_device(device)
    return device


def _join() -> torch.device:
    """Initialise the process group when all ranks have found devices of one kind; returns this rank's.

    They tell each other by the store: one that is missing would keep the others waiting in the first collective, and
    on another machine no launcher would end them.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIME_TO_START))
    device, fault = None, None
    try:
        device = _pick_device()
    except ValueError as error:
        fault = error
    told = _exchange((fault, _kind_of(device) if device else ""), dist.PrefixStore("devices", store), rank, size)
    _raise_fault([(host, fault) for host, (fault, _) in told], rank)
    advice = 'give all of them the same, or set CUDA_VISIBLE_DEVICES="" on all of them'
    _compare("the device that they train on", [(host, kind) for host, (_, kind) in told], advice)
    store.set_timeout(_TIMEOUT)
    cuda = device.type == "cuda"
    # Of high priority: sums are to travel while k-means searches, not after it has filled the GPU.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if cuda else None
    if options is not None:
        options._timeout = _TIMEOUT  # else it warns of two
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=_TIMEOUT,
        pg_options=options,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
    )
    return device


def _kind_of(device: torch.device) -> str:
    """What ranks must have in common to work together: bits differ between versions, and types between GPUs."""
    kind = "the CPU"
    if device.type == "cuda":
        half = "float16" if torch.cuda.get_device_capability(device) < (8, 0) else "bfloat16"
        kind = f"a GPU that computes in {half}"
    return f"{kind}, PyTorch {torch.__version__}"


def _exchange(item: Any, store: dist.Store, rank: int, size: int) -> list[tuple[str, Any]]:
    """(host, item) of every rank, before there is a process group.

    Raises:
        ValueError: a rank is not there in time.
    """
    store.set(str(rank), pickle.dumps((socket.gethostname(), item)))
    try:
        return [pickle.loads(store.get(str(other))) for other in range(size)]
    except dist.DistStoreError as error:
        raise ValueError("not all ranks have started in time; the other machines' output says why") from error


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


def gather_objects(item: Any, world: World) -> list[Any]:
    """Every rank's `item` (picklable), in rank order, on all ranks."""
    if world.group is None:
        return [item]
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item, group=world.group)
    return items


def together(work: Callable[[], T], world: World) -> T:
    """work() on every rank; returns each rank's own result when all are done. It must not use collectives itself.

    Raises:
        UserError, ValueError, OSError: what work() raised here, or else on the first rank where it did; so that none is
            left waiting for one that is gone. What comes from another machine is a UserError that names it.
    """
    result, fault = None, None
    try:
        result = work()
    except _FAULTS as error:
        fault = error
    _raise_fault(gather_objects((socket.gethostname(), fault), world), world.rank)
    return result


def main_first(work: Callable[[], T], world: World) -> T:
    """work() on the main rank, then on one rank of every other machine, then on all others; each turn finds what the
    one before has left, if only on its own disk. Returns each rank's own result.

    Raises:
        UserError, ValueError, OSError: as `together` does; the turns that follow then do not call it.
    """
    turn = 0 if world.is_main else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    results = [together(work if turn == now else lambda: None, world) for now in range(3)]
    return results[turn]


def check_same(what: str, value: str, world: World, *, advice: str) -> None:
    """Whether `value` is the same on all ranks.

    Args:
        what: the value's name, for the message.
        value: this rank's.
        world: the ranks.
        advice: what to do if they differ.

    Raises:
        ValueError: on every rank, if they differ; says which machines have which.
    """
    _compare(what, gather_objects((socket.gethostname(), value), world), advice)


def _compare(what: str, values: Sequence[tuple[str, str]], advice: str) -> None:
    """values: (host, value) of every rank."""
    ranks: dict[str, dict[str, list[int]]] = {}
    for rank, (host, value) in enumerate(values):
        ranks.setdefault(value, {}).setdefault(host, []).append(rank)
    if len(ranks) == 1:
        return
    lines = [
        f"{value}: " + ", ".join(f"{host} (rank {' '.join(map(str, numbers))})" for host, numbers in hosts.items())
        for value, hosts in ranks.items()
    ]
    raise ValueError(f"the ranks differ in {what}; {advice}:\n  " + "\n  ".join(lines))


def _raise_fault(faults: Sequence[tuple[str, Exception | None]], rank: int) -> None:
    """Raise this rank's fault, which knows where it came from, or else the first. faults: (host, fault) of each."""
    here, own = faults[rank]
    for host, fault in [(here, own), *faults]:
        if fault is not None:
            raise fault if host == here else UserError(f"on {host}: {fault}")
