"""What all ranks must agree on before one waits for another: whether an error was raised, equal values, whose turn it
is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from pcl_fast.distributed.collectives import all_gather_shards, shard_lengths
from pcl_fast.distributed.messages import from_bytes, to_bytes
from pcl_fast.distributed.world import World
from pcl_fast.errors import UserError

T = TypeVar("T")
# Errors that a user can mend, and that are raised on all ranks.
_FAULTS = (UserError, ValueError, OSError)


def gather_objects(item: Any, world: World) -> list[Any]:
    """Return every rank's `item`, in rank order, on all ranks; tensors in it on the CPU. What it may be: `to_bytes`."""
    if world.group is None:
        return [item]
    message = torch.from_numpy(np.frombuffer(bytearray(to_bytes(item)), np.uint8)).to(world.device)
    lengths = shard_lengths(len(message), world.group, world.device)
    together = all_gather_shards(message, world.group).cpu().numpy().tobytes()
    ends = np.cumsum(lengths).tolist()
    return [from_bytes(together[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


def all_or_none(work: Callable[[], T], world: World) -> T:
    """Run work() on all ranks and return each rank's own result; if it fails on one rank, raise its error on all.

    So no rank waits for another that has ended. All ranks must call this; work() itself must not use collectives.

    Raises:
        UserError, ValueError, OSError: what work() raised on this rank; or else what it raised on the first rank where
            it failed. An error of another machine becomes a UserError that names the machine.
    """
    result, fault = None, None
    try:
        result = work()
    except _FAULTS as error:
        fault = error
    raise_fault(fault, gather_objects((socket.gethostname(), told(fault)), world))
    return result


def main_first(work: Callable[[], T], world: World) -> T:
    """Run work() on the main rank, then on one rank of every other machine, then on all others; return each rank's own
    result.

    So every rank finds the files that an earlier turn has written, even if machines do not share a disk.

    Raises:
        UserError, ValueError, OSError: see `all_or_none`; later turns do not run work() then.
    """
    turn = 0 if world.is_main else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    results = [all_or_none(work if turn == now else lambda: None, world) for now in range(3)]
    return results[turn]


def check_same(what: str, value: str, world: World, *, advice: str) -> None:
    """Refuse a `value` that is not the same on all ranks.

    Args:
        what: the value's name, for the message.
        value: this rank's value.
        world: the ranks.
        advice: what the user should do if ranks differ.

    Raises:
        ValueError: on every rank, if they differ; says which machines have which value.
    """
    compare(what, gather_objects((socket.gethostname(), value), world), advice)


def compare(what: str, values: Sequence[tuple[str, str]], advice: str) -> None:
    """Refuse values that are not all the same; `check_same` with the (host, value) of every rank at hand."""
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


def told(fault: Exception | None) -> tuple[str, str] | None:
    """Return what the other ranks are told of a fault: its kind and its text."""
    if fault is None:
        return None
    kinds = _kinds()
    return next(kind.__name__ for kind in type(fault).__mro__ if kind.__name__ in kinds), str(fault)


def raise_fault(own: Exception | None, faults: Sequence[tuple[str, tuple[str, str] | None]]) -> None:
    """Raise this rank's own error, or else the first of another rank; nothing if there is none.

    Args:
        own: this rank's, or None.
        faults: (host, what it has `told`) of every rank.
    """
    if own is not None:
        raise own
    here = socket.gethostname()
    for host, fault in faults:
        if fault is not None:
            kind, text = fault
            raise _kinds()[kind](text) if host == here else UserError(f"on {host}: {text}")


def _kinds() -> dict[str, type[Exception]]:
    return {kind.__name__: kind for kind in (*_FAULTS, *UserError.__subclasses__())}
