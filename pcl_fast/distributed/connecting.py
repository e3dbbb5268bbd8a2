"""How the ranks of a run connect, each with a device that it can use."""

from __future__ import annotations

import gc
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pcl_fast.distributed.agreement import compare, raise_fault, told
from pcl_fast.distributed.gpu import check_gpu, check_no_gpu
from pcl_fast.distributed.messages import from_bytes, to_bytes
from pcl_fast.distributed.world import World

# How long a rank may keep the others waiting, for example with AMI at ImageNet's size or on a slow disk.
_TIMEOUT = timedelta(hours=2)
# How long ranks may take to start Python and import PyTorch, perhaps from a network disk.
_TIME_TO_START = timedelta(minutes=15)


def connect() -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, be the only rank.

    Raises:
        ValueError: on all ranks, if one has no GPU that it can use, or if they would compute on different kinds of
            device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, _pick_device(), None)
    device = _pick_device() if dist.is_initialized() else _join()
    return World(dist.get_rank(), size, device, dist.group.WORLD)


def _pick_device() -> torch.device:
    """Return this rank's GPU, or the CPU if there is none. The GPU is checked before anything uses it.

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
    """Initialise the process group once all ranks have found devices of one kind; return this rank's device.

    Ranks exchange what they have found through the store, before there is a group: in the group's first collective the
    others would wait for a rank that has failed, and the launcher of another machine would not end them.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIME_TO_START))
    device, fault = None, None
    try:
        device = _pick_device()
    except ValueError as error:
        fault = error
    kind = _kind_of(device) if device else ""
    found = _exchange((told(fault), kind), dist.PrefixStore("devices", store), rank, size)
    raise_fault(fault, [(host, fault) for host, (fault, _) in found])
    advice = 'give all of them the same, or set CUDA_VISIBLE_DEVICES="" on all of them'
    compare("the device that they train on", [(host, kind) for host, (_, kind) in found], advice)
    store.set_timeout(_TIMEOUT)
    cuda = device.type == "cuda"
    # High priority, so that sums travel while k-means fills the GPU and not only afterwards.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if cuda else None
    if options is not None:
        options._timeout = _TIMEOUT  # otherwise PyTorch warns of two different timeouts
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
    """Return what all ranks of a run must have in common, in words: the kind of device and PyTorch's version. Versions
    compute different bits, and GPUs different types.
    """
    kind = "the CPU"
    if device.type == "cuda":
        half = "float16" if torch.cuda.get_device_capability(device) < (8, 0) else "bfloat16"
        kind = f"a GPU that computes in {half}"
    return f"{kind}, PyTorch {torch.__version__}"


def _exchange(item: Any, store: dist.Store, rank: int, size: int) -> list[tuple[str, Any]]:
    """Return (host, item) of every rank, before there is a process group.

    Raises:
        ValueError: a rank has not started in time.
    """
    store.set(str(rank), to_bytes((socket.gethostname(), item)))
    try:
        return [from_bytes(store.get(str(other))) for other in range(size)]
    except dist.DistStoreError as error:
        raise ValueError("not all ranks have started in time; the other machines' output says why") from error


def disconnect(world: World) -> None:
    """Leave the process group, if there is one, and wait until its threads have ended; `world` has none afterwards.

    A thread of Gloo takes Python's lock to give back the tensors of the last collective. If Python has begun to end by
    then, PyTorch aborts the process (SIGABRT), though its work is done. The threads end with the last reference to the
    group, which whatever was trained may hold in a cycle.
    """
    if world.group is None:
        return
    # What computes for the group waits for its threads as it ends, and lets go of Python's lock meanwhile. The group,
    # in PyTorch 2.5, does not: if it were the last to refer to that, a thread that gives back tensors would never end.
    backend = world.group._get_backend(world.device)
    dist.destroy_process_group()
    object.__setattr__(world, "group", None)  # for anybody else it stays frozen
    gc.collect()
    del backend
