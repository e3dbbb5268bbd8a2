"""Sums over clusters: the same bits every time, however the GPU schedules its work.

Points are sorted by cluster (stable, so within a cluster they stay in order), and one program adds up a cluster's
points, in this order. Atomic additions in the points' own order would need no sorting, but add in any order: other bits
every time, and k-means that ends elsewhere.
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK_D = 128  # the most entries of a row that a program adds up


def segment_sums(
    values: torch.Tensor, assignment: torch.Tensor, k: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and numbers of the rows of every cluster; 0 for a cluster without any.

    Args:
        values: [n, d] of any floating point type up to float32, contiguous.
        assignment: [n] integers in [0, k).
        out: [k, d] float32, contiguous, for the sums.

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
    """Few for small clusters, which would leave most of a tile empty; many for large ones, to have enough in flight."""
    return min(64, max(16, triton.next_power_of_2(triton.cdiv(n, 4 * k))))


@triton.jit
def add_segments(
    values, order, bounds, sums, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid: clusters x blocks of D."""
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
