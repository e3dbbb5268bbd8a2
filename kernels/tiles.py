"""What the kernels share: reading and writing tiles of matrix rows, and the units of scores."""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
import triton
import triton.language as tl

# Scores are kept in units of log 2, because the hardware's exponential is exp2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Finite stand-ins for -inf, because -inf - -inf is NaN. LOWEST is the maximum of no scores. HIDDEN is what a hidden
# score starts from before it is multiplied by its weight: even with a weight of 1e-11 it is so far below LOWEST that
# its exponential is 0 relative to that (with fp32 features too, whose products are divided by 2^20: 3e37 * 1e-11 *
# 1.4e-6 = 4e20). With a large weight it becomes -inf, whose exponential is 0, too.
HIDDEN = tl.constexpr(-3e37)
LOWEST = tl.constexpr(-1e20)


OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2)


@triton.jit
def _places(ids, valid, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = first + tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (d < D)[None, :]
    return ids.to(tl.int64)[:, None] * D + d[None, :], mask


@triton.jit
def load_rows(matrix, ids, valid, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return BLOCK_D entries, from `first` on, of rows of a [*, D] matrix; 0 in rows not valid and beyond D."""
    places, mask = _places(ids, valid, first, D, BLOCK_D)
    return tl.load(matrix + places, mask=mask, other=0.0)


@triton.jit
def store_rows(matrix, ids, rows, valid, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store what `load_rows` would load again."""
    places, mask = _places(ids, valid, first, D, BLOCK_D)
    tl.store(matrix + places, rows, mask=mask)


@triton.jit
def reciprocal(x):
    """Return 1 / x, correctly rounded, because a score must not depend on where its weight was computed."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x.to(tl.float32))


INTERPRETED = not isinstance(load_rows, triton.JITFunction)
