"""What stands between the pieces of a captured step: the exchanges with other ranks, which no CUDA graph holds here.

A graph with an exchange in it would have to be captured by all ranks alike, at the same time. So a step is captured in
pieces, from one exchange to the next, and ranks need not know of each other meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[[], object]


class CannotCaptureError(Exception):
    """A step cannot be captured: its ranks exchange something where no graph can end."""


class _Capture:
    """The capture that is under way in this process, if there is one."""

    take: Callable[[Call], None] | None = None  # what becomes of the exchanges
    thread: int | None = None  # that captures


def between_graphs(call: Call) -> None:
    """Do call(), an exchange with other ranks: now, or where a step is being captured, whenever the step is replayed.

    The call reads and writes tensors that exist by now; what it returns is ignored.

    Raises:
        CannotCaptureError: a step is being captured, and the call comes from another thread. Autograd has one of its
            own for a GPU's backward pass, and a graph can be ended only by the thread that has begun it.
    """
    if _Capture.take is None:
        call()
    elif threading.get_ident() == _Capture.thread:
        _Capture.take(call)
    else:
        raise CannotCaptureError("ranks exchange something within the backward pass")


@contextmanager
def taking_calls(take: Callable[[Call], None]) -> Iterator[None]:
    """In this context take(call) is called for each `between_graphs(call)` of this thread."""
    before = _Capture.take, _Capture.thread
    _Capture.take, _Capture.thread = take, threading.get_ident()
    try:
        yield
    finally:
        _Capture.take, _Capture.thread = before
