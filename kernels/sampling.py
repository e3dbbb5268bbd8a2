"""Negative prototypes drawn inside a kernel, by a keyed permutation of which each program computes its own part.

The negatives of a granularity with K prototypes are the first r ids of a random permutation that are nobody's positive;
such ids are called free. The permutation is never stored. It is a Feistel network on a grid of height x width >= K
cells: a position is split into a row and a column, and each round adds to one of the two, modulo its size, a hash of
the other and the seed. Every round can be undone, so this is a permutation whatever the hash is, and the position of a
given id can be computed too. Ids from K on are holes, which are skipped as positives are; the grid is chosen to have
almost none (`sampling_plain.grid`).

The first r free ids lie at positions [0, end), where end is r plus the number of positives and holes before end. To
leave these out of the list would take a search for every entry. Instead

- a positive stays in the list. It stands for the first of the batch's columns with this prototype (the batch has one
  column per row, its positive), and that column's place in the list goes to one of the positions [r, end);
- a hole stays in the list with weight 0, and its own place goes to one of these positions as well.

There are as many places to give as positions from r to end. So the list of columns is exactly

    [batch: n] [holes] [positions 0 to r - 1]

and holds what it should: every sampled prototype once, and every row's positive once per row. Whoever contrasts with
the list hides from a row all columns that are its own prototype: its positive, wherever that stands, and those of its
twins, the rows that have the same prototype.
"""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
import triton
import triton.language as tl
from pcl_fast.kernels.tiles import reciprocal

ROUNDS = tl.constexpr(6)


def halves(seed: int) -> tuple[int, int]:
    """Split an int64 into two int32 for `join`. Passed whole, its type in Triton would depend on its size, and every
    type would need a kernel of its own.
    """
    return (seed + 2**31) % 2**32 - 2**31, seed >> 32


@triton.jit
def join(low, high):
    """Return the int64 that `halves` has split."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def mix(x):
    """Return a 32-bit hash, every bit of which depends on every bit of x."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def round_key(seed, i: tl.constexpr):
    """Return the uint32 key of round i under an int64 seed."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low ^ (0x9E3779B9 * (i + 1) & 0xFFFFFFFF)) ^ high)


@triton.jit
def offset(value, key, size):
    """Return a hash of uint32 values, in [0, size)."""
    value = (value ^ key) * 0x9E3779B1
    value ^= value >> 15
    value *= 0x85EBCA77
    return tl.umulhi(value, tl.zeros_like(value) + size)


@triton.jit
def permute(position, height, width, seed):
    """Return the ids at these positions, both int32 in [0, height * width)."""
    height = height.to(tl.uint32)
    width = width.to(tl.uint32)
    row = position.to(tl.uint32) // width
    column = position.to(tl.uint32) - row * width
    for i in tl.static_range(0, ROUNDS, 2):
        row += offset(column, round_key(seed, i), height)
        row = tl.where(row >= height, row - height, row)
        column += offset(row, round_key(seed, i + 1), width)
        column = tl.where(column >= width, column - width, column)
    return (row * width + column).to(tl.int32)


@triton.jit
def unpermute(ids, height, width, seed):
    """Return the positions of these ids: the inverse of `permute`."""
    height = height.to(tl.uint32)
    width = width.to(tl.uint32)
    row = ids.to(tl.uint32) // width
    column = ids.to(tl.uint32) - row * width
    for k in tl.static_range(0, ROUNDS, 2):
        column += width - offset(row, round_key(seed, ROUNDS - 1 - k), width)
        column = tl.where(column >= width, column - width, column)
        row += height - offset(column, round_key(seed, ROUNDS - 2 - k), height)
        row = tl.where(row >= height, row - height, row)
    return (row * width + column).to(tl.int32)


@triton.jit
def _repeated(ids, place, index, assignment, n, CHUNK: tl.constexpr):
    """Return whether a row before `place` has this positive too: bool [E], for ids and place int32 [E]."""
    seen = tl.zeros(ids.shape, dtype=tl.int32)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_ids = tl.load(assignment + tl.load(index + other, mask=other < n, other=0)).to(tl.int32)
        same = (ids[:, None] == other_ids[None, :]) & (other[None, :] < tl.minimum(place, n)[:, None])
        seen = tl.maximum(seen, tl.max(same.to(tl.int32), axis=1))
    return seen > 0


@triton.jit
def _batch_columns(
    index, assignment, n, size, columns, height, width, seed, EXCLUDED: tl.constexpr, CHUNK: tl.constexpr
):
    """Return the ids of the list's first n + holes columns (see the module), int32 [EXCLUDED], which may be longer."""
    place = tl.arange(0, EXCLUDED)
    positive = tl.load(assignment + tl.load(index + place, mask=place < n, other=0)).to(tl.int32)
    ids = tl.where(place < n, positive, size + place - n)
    cells = height * width
    excluded = (ids < cells) & (_repeated(ids, place, index, assignment, n, CHUNK) == 0)
    position = unpermute(tl.where(excluded, ids, 0), height, width, seed)
    # end = columns + |excluded positions before end| is solved from below: every step adds the excluded positions that
    # the last step let in, and so never passes the least solution.
    end = columns
    previous = columns - 1
    while end != previous:
        previous = end
        end = tl.minimum(columns + tl.sum((excluded & (position < previous)).to(tl.int32), axis=0), cells)
    inside = excluded & (position < end)
    beyond = columns + tl.cumsum(inside.to(tl.int32), axis=0) - 1
    moved = tl.where(beyond < cells, permute(tl.minimum(beyond, cells - 1), height, width, seed), size)
    return tl.where(inside, moved, ids)


@triton.jit
def pick(slot, x0, x1, x2, x3, USED: tl.constexpr):
    """Return x_slot. The values of unused slots are never taken, and only need the right type."""
    x = x0
    if USED > 1:
        x = tl.where(slot == 1, x1, x)
    if USED > 2:
        x = tl.where(slot == 2, x2, x)
    if USED > 3:
        x = tl.where(slot == 3, x3, x)
    return x


SLOTS = 4  # the most banks in a launch, which `pick` chooses from


def per_slot(*names: str) -> list[str]:
    """Return the names of the arguments that a kernel has once per slot: name0, name1, ..."""
    return [f"{name}{slot}" for name in names for slot in range(SLOTS)]


# Sizes change from bank to bank and from epoch to epoch, seeds with every step: no reason to compile again.
@triton.jit(
    do_not_specialize=[
        *per_slot("size", "columns", "height", "width"),
        "n",
        "seed_low",
        "seed_high",
        "granularity",
        "stride",
    ],
)
def draw(
    index, assignment0, assignment1, assignment2, assignment3,
    concentration0, concentration1, concentration2, concentration3,
    size0, size1, size2, size3, columns0, columns1, columns2, columns3,
    height0, height1, height2, height3, width0, width1, width2, width3,
    seed_on_device, seed_low, seed_high, granularity, list_ids, list_weights, n, stride,
    USED: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr, EXCLUDED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write one block of one set's list per program (block, set): ids int32 and weights float32, each [sets, stride].

    A weight of 0 means that there is no column. Block 0 is the first n + holes columns. Set `slot` draws with
    seed + granularity + slot.
    """
    slot = tl.program_id(1)
    assignment = pick(slot, assignment0, assignment1, assignment2, assignment3, USED)
    concentration = pick(slot, concentration0, concentration1, concentration2, concentration3, USED)
    size = pick(slot, size0, size1, size2, size3, USED)
    columns = pick(slot, columns0, columns1, columns2, columns3, USED)
    height = pick(slot, height0, height1, height2, height3, USED)
    width = pick(slot, width0, width1, width2, width3, USED)
    key = join(seed_low, seed_high) + granularity + slot
    if SEEDED:
        key = tl.load(seed_on_device) + granularity + slot

    line = slot.to(tl.int64) * stride
    first = n + height * width - size
    if tl.program_id(0) == 0:
        place = tl.arange(0, EXCLUDED)
        batch = _batch_columns(index, assignment, n, size, columns, height, width, key, EXCLUDED, CHUNK)
        _write(list_ids + line, list_weights + line, place, batch, place < first, size, concentration)
    else:
        position = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        ids = permute(position, height, width, key)
        _write(
            list_ids,
            list_weights,
            slot.to(tl.int64) * stride + first + position,
            ids,
            position < columns,
            size,
            concentration,
        )


@triton.jit
def _write(list_ids, list_weights, place, ids, valid, size, concentration):
    phi = tl.load(concentration + ids, mask=valid & (ids < size), other=float("inf"))
    tl.store(list_ids + place, tl.minimum(ids, size - 1), mask=valid)
    tl.store(list_weights + place, reciprocal(phi), mask=valid)
