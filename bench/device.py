"""What measuring needs beyond pytest-benchmark: the GPU's clock, a cold cache, memory, CUDA graphs, the GPU's rates."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
WARM_UP = 3


class GpuInstant:
    """A moment by the GPU's clock: when everything that was enqueued before is done.

    The difference of two, in seconds, waits for the later one; nothing else waits. So it is the time that the GPU
    worked and the time that it was idle because the host was late.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: GpuInstant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


clock = GpuInstant if CUDA else time.perf_counter


@functools.cache
def _filler() -> torch.Tensor:
    """Return memory that is larger than the L2 cache of any GPU."""
    return torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")


def flush_cache() -> None:
    """Drive the inputs out of the GPU's L2 cache, as the rest of a training step does.

    The host does not wait: by the time that the GPU is done, it has launched the first kernels. So their latency is
    hidden, and only gaps between kernels count. On a CPU this does nothing.
    """
    if CUDA:
        _filler().zero_()


def peak_bytes(function: Callable) -> tuple[object, int | None]:
    """Return (result, bytes): what the function returns, and the most memory that it had allocated on the GPU beyond
    what was allocated before; None for this on a CPU, where it is not counted.
    """
    if not CUDA:
        return function(), None
    gc.collect()  # a capture does this too, and would free memory that is counted as allocated before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    return result, torch.cuda.max_memory_allocated() - before


def capture(step: Callable[[], torch.Tensor]) -> tuple[Callable[[], torch.Tensor], int | None]:
    """Return (replay, bytes): the step as a CUDA graph, and the peak of its memory pool, which it keeps.

    What a step does only the first times (compile kernels, allocate workspaces) cannot be captured. It is done before,
    on a side stream, because a capture does not run on the default stream either.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()

    def record() -> torch.Tensor:
        with torch.cuda.graph(graph):
            return step()

    output, size = peak_bytes(record)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay, size


def cores() -> int:
    """Return how many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(function: Callable) -> float:
    """Return how long one call takes, in seconds."""
    start = clock()
    function()
    return clock() - start


def rounds_for(function: Callable, total: float, most: int) -> int:
    """Return how many rounds of a warm function take `total` seconds, but at least 3 and at most `most`."""
    return max(3, min(most, int(total / seconds(function))))


def copy_rate() -> float:
    """Return the bytes per second, read and written ones added, of a copy that is too large for any cache."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def matmul_rate(size: int = 8192) -> float:
    """Return the floating point operations per second of PyTorch's product of two square matrices in fp16."""
    left, right = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=product))


def median_seconds(function: Callable, calls: int = 10) -> float:
    """Return how long one of `calls` calls in a row takes, in seconds: the median of five such rows."""

    def in_a_row() -> None:
        for _ in range(calls):
            function()

    in_a_row()
    return statistics.median(seconds(in_a_row) for _ in range(5)) / calls
