"""Which kernels this process leaves to their plain twins, because they were found wrong on its GPU.

Whoever chooses between a kernel and its plain twin asks `is_off`. A run decides anew at its start, for all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Modules of kernels that have a plain twin: the loss, nearest centroids, sums over clusters, images, batch norm, max
# pooling, the first convolution. The twin of assign_held is assign with its own sweep, those of max_pool and stem are
# PyTorch's.
KERNELS = (
    "contrast", "assign_held", "assign", "segment", "normalise", "photometric", "batch_norm", "max_pool", "stem",
)  # fmt: skip
_off: frozenset[str] = frozenset()


def switch_off(names: Iterable[str]) -> None:
    """Leave these of `KERNELS` to their plain twins from now on, and no others."""
    global _off
    _off = frozenset(names) & frozenset(KERNELS)


def is_off(name: str) -> bool:
    """Return whether one of `KERNELS` is left to its plain twin."""
    return name in _off


@contextmanager
def without(name: str) -> Iterator[None]:
    """Leave one more of `KERNELS` to its plain twin for a while."""
    global _off
    before, _off = _off, _off | {name}
    try:
        yield
    finally:
        _off = before
