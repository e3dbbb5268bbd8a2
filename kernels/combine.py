"""The kernels that turn what `stream` wrote into losses and gradients, and the backward pass. See contrast.py."""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
import triton
import triton.language as tl
from pcl_fast.kernels.tiles import LN2, LOG2E, LOWEST, load_rows


@triton.jit
def _softplus(x):
    """Return log(1 + e^x) = max(x, 0) + log1p(y) with y = e^-|x|.

    log1p(y) = 2 artanh(y / (2 + y)) is summed as a series, whose argument lies in [0, 1/3]. It is exact for small y,
    where the hardware's logarithm of a number near 1 is not.
    """
    y = tl.exp2(-tl.abs(x) * LOG2E)
    t = y / (2.0 + y)
    square = t * t
    series = 1.0 / 15.0
    for k in tl.static_range(7):
        series = series * square + 1.0 / (13.0 - 2.0 * k)
    return tl.maximum(x, 0.0) + 2.0 * t * series


@triton.jit
def _difference(largest, total, score):
    """Return z = logsumexp - s+ in units of log 2, or LOWEST where there are no negatives (total = 0)."""
    some = total != 0  # true for NaN too
    return tl.where(some, (largest - score) + tl.log2(tl.where(some, total, 1.0)), LOWEST)


@triton.jit(do_not_specialize=["n", "banks"])
def combine(
    maxima, sums, numerators, scores, positives, ends, loss, correct, gradient, mean_loss,
    n, banks, first_share, other_share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write loss, correct and gradient of one row and bank per program; program banks * n writes the weighted mean of
    the losses.
    """
    if tl.program_id(0) == banks * n:
        _mean_loss(maxima, sums, scores, ends, mean_loss, n, banks, first_share, other_share)
    else:
        bank = tl.program_id(0) // n
        row = tl.program_id(0) % n
        first = tl.load(ends + bank - 1, mask=bank > 0, other=0)
        last = tl.load(ends + bank)
        largest = LOWEST
        for start in range(first, last, PARTS):
            part = start + tl.arange(0, PARTS)
            largest_here = tl.load(maxima + part.to(tl.int64) * n + row, mask=part < last, other=LOWEST)
            largest = tl.maximum(largest, tl.max(largest_here, axis=0))
        total = 0.0
        numerator = tl.zeros([BLOCK_D], tl.float32)
        for start in range(first, last, PARTS):
            part = start + tl.arange(0, PARTS)
            line = part.to(tl.int64) * n + row
            decay = tl.exp2(tl.load(maxima + line, mask=part < last, other=LOWEST) - largest)
            total += tl.sum(decay * tl.load(sums + line, mask=part < last, other=0.0), axis=0)
            numerator += tl.sum(decay[:, None] * load_rows(numerators, line, part < last, 0, D, BLOCK_D), axis=0)
        score = tl.load(scores + bank * n + row)
        z = _difference(largest, total, score)
        line = bank.to(tl.int64) * n + row
        tl.store(loss + line, _softplus(z * LN2))
        # On a GPU a maximum ignores NaN; the total does not.
        tl.store(correct + line, ((score > largest) & (total == total)).to(tl.uint8))
        # e^z / (1 + e^z), without overflow.
        small = tl.exp2(-tl.abs(z))
        sigmoid = tl.where(z > 0, 1.0, small) / (1.0 + small)
        d = tl.arange(0, BLOCK_D)
        positive = tl.load(positives + line * D + d, mask=d < D, other=0.0)
        mean = numerator / tl.where(total != 0, total, 1.0)
        tl.store(gradient + line * D + d, sigmoid * (mean - positive), mask=d < D)


@triton.jit
def _mean_loss(maxima, sums, scores, ends, mean_loss, n, banks, first_share, other_share):
    """Write first_share * (sum of bank 0's losses) + other_share * (sum of the other banks' losses).

    The losses are computed again from the parts' maxima and sums: to read those that the other programs write, another
    launch would be needed.
    """
    # Large tiles, because one program walks through all parts of all banks, and waits for memory at each step.
    PARTS: tl.constexpr = 64
    ROWS: tl.constexpr = 64
    result = tl.zeros([ROWS], tl.float32)
    for bank in range(banks):
        first = tl.load(ends + bank - 1, mask=bank > 0, other=0)
        last = tl.load(ends + bank)
        share = tl.where(bank == 0, first_share, other_share)
        for start_row in range(0, n, ROWS):
            row = start_row + tl.arange(0, ROWS)
            largest = tl.full([ROWS], LOWEST, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            for start in range(first, last, PARTS):
                part = start + tl.arange(0, PARTS)
                line = part.to(tl.int64)[:, None] * n + row[None, :]
                mask = (part < last)[:, None] & (row < n)[None, :]
                largest_here = tl.load(maxima + line, mask=mask, other=LOWEST)
                total_here = tl.load(sums + line, mask=mask, other=0.0)
                new = tl.maximum(largest, tl.max(largest_here, axis=0))
                total *= tl.exp2(largest - new)
                total += tl.sum(total_here * tl.exp2(largest_here - new[None, :]), axis=0)
                largest = new
            score = tl.load(scores + bank * n + row, mask=row < n, other=0.0)
            loss = _softplus(_difference(largest, total, score) * LN2)
            result += tl.where(row < n, loss * share, 0.0)
    tl.store(mean_loss, tl.sum(result, axis=0))


@triton.jit(do_not_specialize=["n", "banks", "bank_stride", "row_stride"])
def weigh(
    gradient, upstream_mean, upstream_rows, out, n, banks, bank_stride, row_stride, first_share, other_share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of one row per program over the banks, each times the upstream gradient of its loss."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for bank in range(banks):
        flow = 0.0
        if MEAN:
            flow += tl.load(upstream_mean).to(tl.float32) * tl.where(bank == 0, first_share, other_share)
        if BY_ROW:
            flow += tl.load(upstream_rows + bank * bank_stride + row * row_stride).to(tl.float32)
        line = (bank * n + row).to(tl.int64) * D
        total += flow * tl.load(gradient + line + d, mask=d < D, other=0.0)
    tl.store(out + row.to(tl.int64) * D + d, total, mask=d < D)
