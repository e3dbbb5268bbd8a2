"""What all ranks must agree on before one waits for another: faults, values, turns."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from pcl_fast.distributed.world import World
from pcl_fast.errors import UserError

T = TypeVar("T")
# What a user can mend, and all ranks are to hear of.
_FAULTS = (UserError, ValueError, OSError)


def gather_objects(item: Any, world: World) -> list[Any]:
    """Every rank's `item` (picklable), in rank order, on all ranks."""
    if world.group is None:
        return [item]
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item, group=world.group)
    return items


def all_or_none(work: Callable[[], T], world: World) -> T:
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
    raise_fault(gather_objects((socket.gethostname(), fault), world), world.rank)
    return result


def main_first(work: Callable[[], T], world: World) -> T:
    """work() on the main rank, then on one rank of every other machine, then on all others; each turn finds what the
    one before has left, if only on its own disk. Returns each rank's own result.

    Raises:
        UserError, ValueError, OSError: as `all_or_none` does; the turns that follow then do not call it.
    """
    turn = 0 if world.is_main else 1 if int(os.environ.get("LOCAL_RANK", "0")) == 0 else 2
    results = [all_or_none(work if turn == now else lambda: None, world) for now in range(3)]
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
    compare(what, gather_objects((socket.gethostname(), value), world), advice)


def compare(what: str, values: Sequence[tuple[str, str]], advice: str) -> None:
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


def raise_fault(faults: Sequence[tuple[str, Exception | None]], rank: int) -> None:
    """Raise this rank's fault, which knows where it came from, or else the first. faults: (host, fault) of each."""
    here, own = faults[rank]
    for host, fault in [(here, own), *faults]:
        if fault is not None:
            raise fault if host == here else UserError(f"on {host}: {fault}")
