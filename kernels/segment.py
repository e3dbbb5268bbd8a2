"""Sums over clusters that have the same bits every time, however the GPU schedules its work.

Points are sorted by cluster (stably, so that within a cluster they stay in order), and one program adds up the points
of a cluster in this order. Atomic additions would need no sorting, but the order in which they happen is left to
chance: the sums would have other bits every time, and k-means could end in another place.
"""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK_D = 128  # how many entries of a row a program adds up at most


def segment_sums(
    values: torch.Tensor, assignment: torch.Tensor, k: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the number of the rows of every cluster; both are 0 for an empty cluster.

    Args:
        values: [n, d] of any floating point type up to float32, contiguous.
        assignment: [n] integers in [0, k).
        k: number of clusters.
        out: where the sums are written, [k, d] float32, contiguous; new memory if None.

    Returns:
        sums [k, d] float32 (added in float32), counts [k] int64.
    """
    n, d = values.shape
    sums = torch.empty(k, d, dtype=torch.float32, device=values.device) if out is None else out
    clusters, order = assignment.sort(stable=True)
    bounds = torch.searchsorted(clusters, torch.arange(k + 1, dtype=clusters.dtype, device=clusters.device))
    block_d = min(BLOCK_D, triton.next_power_of_2(d))
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        add_segments[(k, triton.cdiv(d, block_d))](
            values, order, bounds, sums,
            D=d, BLOCK_D=block_d, ROWS=rows_at_once(n, k),
        )  # fmt: skip
    return sums, bounds.diff()


def rows_at_once(n: int, k: int) -> int:
    """Return how many rows a program loads at once: few for small clusters, which would leave most of a tile empty;
    many for large ones, so that enough loads are in flight.
    """
    return min(64, max(16, triton.next_power_of_2(triton.cdiv(n, 4 * k))))


@triton.jit
def add_segments(
    values, order, bounds, sums, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write sums [k, D]. The grid is clusters x blocks of D."""
    cluster = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(bounds + cluster)
    end = tl.load(bounds + cluster + 1)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=3):
        place = start + tl.arange(0, ROWS)
        rows = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (d < D)[None, :]
        total += tl.load(values + rows[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + cluster.to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)
