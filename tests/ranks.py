"""Run functions on several gloo processes, which are started once and kept for all tests."""

from __future__ import annotations

import functools
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from pcl_fast.distributed import World

# Seconds; starting the processes takes about ten of them on two busy cores.
_PATIENCE = 120


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(world, *args) on `size` ranks; its results in rank order. `function` must be a module's own."""
    pipes = _start(size)
    for pipe in pipes:
        pipe.send((function, args))
    replies = [pipe.recv() if pipe.poll(_PATIENCE) else ("no answer", None) for pipe in pipes]
    if errors := [error for error, _ in replies if error]:
        _start.cache_clear()  # ranks that have lost step with each other are of no more use
        raise AssertionError("\n".join(errors))
    return [result for _, result in replies]


@functools.cache
def _start(size: int) -> list:
    """Pipes to the processes of a group of `size` ranks; daemons, so that they end with the tests."""
    context = torch.multiprocessing.get_context("spawn")
    store = tempfile.mkdtemp()
    pipes = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True).start()
        pipes.append(ours)
    return pipes


def _serve(rank: int, size: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/store", rank=rank, world_size=size, timeout=timedelta(seconds=_PATIENCE)
    )
    world = World(rank, size, torch.device("cpu"), dist.group.WORLD)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(world, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
