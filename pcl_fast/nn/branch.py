"""Work that a GPU does beside other work of the same step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def branch(work: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Return a function that returns work(), and that is to be called once, before the step ends.

    While a step is captured as a CUDA graph, the work becomes a branch of it: the GPU does it beside all that is
    captured until the function is called, and so has something to do where a kernel of either leaves it idle. Otherwise
    the function does the work when it is called. The results are the same.

    Memory needs no more care: what the work allocates belongs to its stream, which waits for all that came before the
    next branch, and whoever takes the result waits for the work.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return work
    stream, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        result = work()

    def join() -> Result:
        stream.wait_stream(side)
        return result

    return join


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all branches: memory that it has used is its own."""
    return torch.cuda.Stream(device)
