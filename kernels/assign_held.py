"""`assign.sweep` for Hopper (sm_90), whose matrix units can take one factor from registers: points stay there.

`sweep` reads both factors of a product from shared memory, 128 bytes a clock at 64 columns, which is all that a
multiprocessor gives, and copies the next centroids on top of that. Here points are read once, so that a product reads
half as much, and one program, which no second one fits beside, does what otherwise takes two: while the matrix units
work on the scores of a tile, it looks for the maxima of the tile before. Triton waits for a product where it is begun,
so this is written in Gluon, which is Triton with layouts and waits said by hand.

The accumulator starts from zero and -|c|^2 / 2 is added afterwards: the compiler lets products of a warp run only if no
other instruction writes what they add to.

How tiles of centroids take turns, with SLOTS = 4 places in shared memory. In the step of tile t

    begin the product of tile t + 1
    wait for the copy of tile t + 2, and for all warps: now everyone sees it, and nobody multiplies tile t any more
    copy tile t + 4 to the place of tile t
    look for the maxima of tile t
    wait for the product

so a copy has two steps' time, and no warp waits for another between two of its products. Only places that the compiler
can tell apart need no further barriers, which is why each has a name and four steps are written out.
"""

# Gluon's kernels see globals only if they are constexpr, as Triton's.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

SLOTS = 4  # tiles of centroids in shared memory, and steps that `sweep` is made of
WIDTH = 128  # d that it is for: what it does for a smaller one takes registers from the loop
_SLOTS = gl.constexpr(SLOTS)


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _largest_by_class(scores, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CLASSES: gl.constexpr):
    by_class = scores.reshape([ROWS, COLUMNS // (2 * CLASSES), CLASSES, 2])
    return gl.reduce(gl.reduce(by_class, 3, _larger), 1, _larger)


@gluon.jit
def _copy(places, offsets, c, start, tile, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """Begin to copy a tile of centroids and of their offsets to shared memory."""
    async_copy.async_copy_global_to_shared(c, places + tile * (COLUMNS * WIDTH))
    async_copy.async_copy_global_to_shared(start, offsets + tile * COLUMNS)
    async_copy.commit_group()


@gluon.jit
def _multiply(x, c, zero):
    """Begin a product."""
    return warpgroup_mma(x, c.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _step(
    x, zero, scores, largest, tile_of_largest, tile, places, offsets, c, start, next_c,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, CLASSES: gl.constexpr, WIDTH: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Take up the scores of a tile, which lies in c and start, and return those of the next, which lies in next_c."""
    begun = _multiply(x, next_c, zero)
    offset = gl.expand_dims(start.load(gl.SliceLayout(0, MMA)), 0)
    async_copy.wait_group(_SLOTS - 3)
    fence_async_shared()
    gl.thread_barrier()
    _copy(places, offsets, c, start, tile + _SLOTS, COLUMNS, WIDTH)
    largest_here = _largest_by_class(scores + offset, ROWS, COLUMNS, CLASSES)
    better = largest_here > largest
    largest = gl.where(better, largest_here, largest)
    tile_of_largest = gl.where(better, tile, tile_of_largest)
    return warpgroup_mma_wait(0, [begun]), largest, tile_of_largest


@gluon.jit(do_not_specialize=["n", "tiles"])
def sweep_held(
    points, high, offset, found, n, tiles,
    WIDTH: gl.constexpr, COLUMNS: gl.constexpr, CLASSES: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write found [n] int32, as `assign.sweep` does for points of fp16, [n, WIDTH]. The grid is tiles of points.

    Tiles are read four at a time and four ahead: there must be so many in high and offset.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows = gl.program_id(0).to(gl.int64) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, COPIED))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, COPIED))
    valid = gl.expand_dims(rows < n, 1)
    x = gl.load(points + gl.expand_dims(rows, 1) * WIDTH + gl.expand_dims(d, 0), mask=valid, other=0.0)
    x = gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2))

    ROW: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    c0 = gl.allocate_shared_memory(gl.float16, [COLUMNS, WIDTH], ROW)
    c1 = gl.allocate_shared_memory(gl.float16, [COLUMNS, WIDTH], ROW)
    c2 = gl.allocate_shared_memory(gl.float16, [COLUMNS, WIDTH], ROW)
    c3 = gl.allocate_shared_memory(gl.float16, [COLUMNS, WIDTH], ROW)
    start0 = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN)
    start1 = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN)
    start2 = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN)
    start3 = gl.allocate_shared_memory(gl.float32, [COLUMNS], PLAIN)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(1, COPIED))
    places = high + gl.expand_dims(columns, 1) * WIDTH + gl.expand_dims(d, 0)
    offsets = offset + gl.arange(0, COLUMNS, LINE)
    _copy(places, offsets, c0, start0, 0, COLUMNS, WIDTH)
    _copy(places, offsets, c1, start1, 1, COLUMNS, WIDTH)
    _copy(places, offsets, c2, start2, 2, COLUMNS, WIDTH)
    _copy(places, offsets, c3, start3, 3, COLUMNS, WIDTH)

    zero = gl.zeros([ROWS, COLUMNS], gl.float32, MMA)
    nothing = gl.full([ROWS, COLUMNS], float("-inf"), gl.float32, MMA)
    largest = _largest_by_class(nothing, ROWS, COLUMNS, CLASSES)
    tile_of_largest = gl.zeros_like(largest).to(gl.int32)
    async_copy.wait_group(_SLOTS - 2)
    fence_async_shared()
    gl.thread_barrier()
    scores = warpgroup_mma_wait(0, [_multiply(x, c0, zero)])
    for tile in range(0, tiles, _SLOTS):
        scores, largest, tile_of_largest = _step(
            x, zero, scores, largest, tile_of_largest, tile, places, offsets, c0, start0, c1,
            ROWS, COLUMNS, CLASSES, WIDTH, MMA,
        )  # fmt: skip
        scores, largest, tile_of_largest = _step(
            x, zero, scores, largest, tile_of_largest, tile + 1, places, offsets, c1, start1, c2,
            ROWS, COLUMNS, CLASSES, WIDTH, MMA,
        )  # fmt: skip
        scores, largest, tile_of_largest = _step(
            x, zero, scores, largest, tile_of_largest, tile + 2, places, offsets, c2, start2, c3,
            ROWS, COLUMNS, CLASSES, WIDTH, MMA,
        )  # fmt: skip
        scores, largest, tile_of_largest = _step(
            x, zero, scores, largest, tile_of_largest, tile + 3, places, offsets, c3, start3, c0,
            ROWS, COLUMNS, CLASSES, WIDTH, MMA,
        )  # fmt: skip
    async_copy.wait_group(0)

    classes = gl.arange(0, CLASSES)
    found_here = tile_of_largest * CLASSES + gl.expand_dims(classes, 0)
    best = largest == gl.expand_dims(gl.max(largest, axis=1), 1)
    first = gl.min(gl.where(best, found_here, 2147483647), axis=1)
    gl.store(found + rows, gl.convert_layout(first, gl.SliceLayout(1, COPIED)), mask=rows < n)
