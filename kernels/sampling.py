"""Negative prototypes drawn inside a kernel: a keyed permutation of the ids, of which each program evaluates its part.

The negatives of a granularity with K prototypes are the first r of a random permutation that are nobody's positive.
The permutation is never stored. It is a Feistel network on a grid of height x width >= K cells: the position is split
into a row and a column, and each round adds to one of them, modulo its own size, a hash of the other and the seed.
Every round can be undone, so this is a permutation whatever the hash, and the position of a given id is known as well.
Cells from K on are holes, skipped like positives; the grid is chosen to have almost none (`sampling_plain.grid`).

The r free ids lie at positions [0, end): end is r and as many as there are positives and holes before end. Leaving
these out of the list would take a search for every entry. Instead

- a positive stays in. It stands for the first of the batch's columns with this prototype (one per row, its positive),
  and that column's place in the list is given to one of the positions [r, end) from beyond the first r;
- a hole stays in with weight 0, and has a place to give as well.

There are as many places as positions beyond. So the list of columns is exactly

    [batch: n] [holes] [positions 0 to r - 1]

and holds what it should: every sampled prototype once, every other row's positive once per row. Who contrasts with it
hides from a row the columns that are its own prototype: its positive, wherever it stands, and its twins.
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
import triton
import triton.language as tl

from pcl_fast.kernels.tiles import reciprocal

ROUNDS = tl.constexpr(6)


def halves(seed: int) -> tuple[int, int]:
    """An int64 as two int32 for `join`. A number's own type would change with its size, and with it the kernel."""
    return (seed + 2**31) % 2**32 - 2**31, seed >> 32


@triton.jit
def join(low, high):
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def mix(x):
    """Hash of 32 bits in which every bit of the result depends on every bit of x."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def round_key(seed, i: tl.constexpr):
    """uint32 key of round i under an int64 seed."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low ^ (0x9E3779B9 * (i + 1) & 0xFFFFFFFF)) ^ high)


@triton.jit
def offset(value, key, size):
    """Hash of uint32 values to [0, size)."""
    value = (value ^ key) * 0x9E3779B1
    value ^= value >> 15
    value *= 0x85EBCA77
    return tl.umulhi(value, tl.zeros_like(value) + size)


@triton.jit
def permute(position, height, width, seed):
    """Ids at positions: int32 in [0, height * width) to int32 in the same range."""
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
    """Positions of ids, the inverse of `permute`."""
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
    """Whether a row before `place` has this positive too: bool [E] for ids, place int32 [E]."""
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
    """Ids of the first n + holes columns, see the module: int32 [EXCLUDED], at least that many."""
    place = tl.arange(0, EXCLUDED)
    positive = tl.load(assignment + tl.load(index + place, mask=place < n, other=0)).to(tl.int32)
    ids = tl.where(place < n, positive, size + place - n)
    cells = height * width
    excluded = (ids < cells) & (_repeated(ids, place, index, assignment, n, CHUNK) == 0)
    position = unpermute(tl.where(excluded, ids, 0), height, width, seed)
    # end = columns + |excluded positions before end|, from below: every step adds the excluded positions that the last
    # step let in, and so never passes the least solution.
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
    """x_slot. What is given for unused slots only needs the type."""
    x = x0
    if USED > 1:
        x = tl.where(slot == 1, x1, x)
    if USED > 2:
        x = tl.where(slot == 2, x2, x)
    if USED > 3:
        x = tl.where(slot == 3, x3, x)
    return x


SLOTS = 4  # banks in a launch: what `pick` picks from


def per_slot(*names: str) -> list[str]:
    return [f"{name}{slot}" for name in names for slot in range(SLOTS)]


# Sizes change from bank to bank and from epoch to epoch, seeds with every step: not worth a compilation each.
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
    """Program (block, set) writes a block of the set's list: ids int32 and weights float32 (0: no column), each
    [sets, stride]. Block 0 is the first n + holes columns.

    Set `slot` draws with seed + granularity + slot.
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
