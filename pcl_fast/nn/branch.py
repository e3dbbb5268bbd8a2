"""Work that a GPU does beside other work of the same step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from pcl_fast.distributed import CannotCaptureError, taking_calls

Result = TypeVar("Result")


@contextmanager
def branch(
    work: Callable[..., Result], device: torch.device, arrive: Callable[[], tuple] = tuple
) -> Iterator[Callable[[], Result]]:
    """Do some work beside what stands in the context. The context's value is a function that returns work(*arrive());
    it is to be called once, and after the context.

    While a step is captured as a CUDA graph, the work becomes a branch of it: the GPU does it beside all that is
    captured in the context, and so has something to do where a kernel of either leaves it idle. Otherwise the function
    does the work when it is called. The results are the same. Ranks exchange nothing in the work or the context, where
    a graph cannot end.

    What the work reads must live until the context ends, as `work` itself does: memory that is freed before could be
    used anew by the other stream. What the work allocates belongs to its own stream, which waits for all that came
    before the next branch.

    Args:
        work: takes what `arrive` returns.
        device: the device of the work.
        arrive: waits for what other ranks send. A branch begins after that; otherwise it is called with the work.

    Raises:
        CannotCaptureError: ranks exchange something in the work or the context of a branch.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: work(*arrive())
        return
    arrived = arrive()
    stream, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(stream)
    try:
        with taking_calls(_refuse):
            with torch.cuda.stream(side):
                result = work(*arrived)
            yield lambda: result
    finally:
        # Also after an error, which the end of a capture with an open branch would hide behind its own.
        stream.wait_stream(side)


def _refuse(_: Callable[[], object]) -> None:
    raise CannotCaptureError("ranks exchange something beside a branch of the step, or within it")


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all branches: memory that it has used is its own."""
    return torch.cuda.Stream(device)
