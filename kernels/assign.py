"""Nearest centroid of every point, without the N x K matrix of distances.

    argmin_j |x - c_j|^2 = argmax_j s_j      s_j = x . c_j - |c_j|^2 / 2

A matrix unit multiplies rows of d = 128 so quickly that most of the time would go to the work on each score. So a score
takes part in one maximum and nothing else, and what that leaves open is settled afterwards. There are three launches:

prepare  It writes the centroids as the matrix units need them: in half precision, padded to whole tiles, with
         -|c|^2 / 2 beside them.
sweep    Every program holds one tile of points and goes through all centroids, a tile at a time. Scores start from
         -|c|^2 / 2 in the accumulator. The columns of a tile are divided into CLASSES classes, so that all columns of a
         class lie in one thread's registers, and their maximum takes no exchange between threads. The program keeps two
         numbers per point and class: the largest score so far, and the tile that it came from. At the end it writes
         the tile and the class of each point's largest score, which leaves COLUMNS / CLASSES candidates.
settle   It compares these candidates by their distances in fp32, summed from differences.

On Hopper, `assign_held.sweep_held` takes the place of sweep for points of fp16 and d = 128.

The index of the largest score is never carried along: a maximum with its index takes three instructions per score
instead of one. To pack the index into the score's low bits would take two more, and would cost bits of the score.

Numerics. Points of fp16 are multiplied as they are, with centroids that are rounded to fp16 (and scaled, to make the
most of its range) and with the |c|^2 of the rounded centroids. So the kernels find the nearest of the rounded
centroids, up to the rounding of the sums in fp32. Points of fp32 and their centroids are each split into two fp16
numbers, high + low, and multiplied as high high + high low + low high: that keeps 22 bits, on the matrix units of every
architecture. Magnitudes from 1e-15 to 1e15 are safe; far beyond them squares leave the range of fp32.
Of centroids that are equally near, always the same one is found.
"""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
from contextlib import nullcontext
from importlib import import_module

import torch
import triton
import triton.language as tl
from pcl_fast.kernels import switches
from pcl_fast.kernels.launch import capability, nearest_tile
from pcl_fast.kernels.tiles import INTERPRETED, OLD_TRITON

# Gluon's names change from version to version, so it is used in the one that it was written for.
assign_held = import_module("pcl_fast.kernels.assign_held") if triton.__version__.startswith("3.6.") else None

CLASSES = 8
BLOCK = 128 if INTERPRETED else 16  # points, or centroids, that a program of `prepare` or `settle` works on
# The score of a centroid that only pads a tile: below every real score, and finite, because an accumulator starts from
# it.
NOTHING = tl.constexpr(-3e38)


def widest(dtype: torch.dtype, device: torch.device) -> int:
    """Return the largest d that the kernels take for points of this type on this device; 0 where they cannot be used.

    Triton up to 3.1 is used for Volta alone, whose matrix units later versions do not support.
    """
    if dtype not in (torch.float16, torch.float32):
        return 0
    target = capability(device)
    if not INTERPRETED and not (70 <= target < 75 if OLD_TRITON else target >= 80):
        return 0
    return max(nearest_tile(target, dtype.itemsize))


def holds(features: torch.Tensor) -> bool:
    """Return whether `assign_held.sweep_held` is for points like these, unless it is switched off."""
    if assign_held is None or INTERPRETED or features.dtype != torch.float16:
        return False
    tiles = nearest_tile(capability(features.device), features.itemsize)
    return features.shape[1] == assign_held.WIDTH and tiles[assign_held.WIDTH].held


def nearest(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the index of each point's nearest centroid, int32 [n].

    Args:
        features: [n, d] float16 or float32, contiguous and finite; d is at most `widest`. fp32 takes three times as
            many products as fp16.
        centroids: [k, d] float32, contiguous and finite.
    """
    n, d = features.shape
    assignment = torch.empty(n, dtype=torch.int32, device=features.device)
    if not n:
        return assignment
    split = features.dtype == torch.float32
    width = max(16, triton.next_power_of_2(d))
    tile = nearest_tile(capability(features.device), features.itemsize)[max(width, 128)]
    tiles = triton.cdiv(len(centroids), tile.columns)
    held = holds(features) and not switches.is_off("assign_held")
    ahead = assign_held.SLOTS if held else 1  # the sweep reads so many tiles ahead, and so many at a time
    padded = (triton.cdiv(tiles, ahead) + 1) * ahead * tile.columns
    high = torch.empty(padded, width, dtype=torch.float16, device=features.device)
    low = torch.empty_like(high) if split else high
    offset = torch.empty(padded, dtype=torch.float32, device=features.device)
    found = torch.empty_like(assignment)
    extremes = torch.stack([*torch.aminmax(centroids), *(torch.aminmax(features) if split else ())])
    constants = {"D": d, "WIDTH": width, "SPLIT": split}
    columns = {"COLUMNS": tile.columns, "CLASSES": CLASSES}
    with torch.cuda.device(features.device) if features.is_cuda else nullcontext():
        prepare[(triton.cdiv(padded, BLOCK),)](
            centroids, extremes, high, low, offset, len(centroids), padded, **constants, ROWS=BLOCK
        )
        grid = (triton.cdiv(n, tile.rows),)
        if held:
            assign_held.sweep_held[grid](
                features, high, offset, found, n, tiles,
                WIDTH=width, **columns, ROWS=tile.rows, WARPS=tile.warps, num_warps=tile.warps,
            )  # fmt: skip
        else:
            sweep[grid](
                features, extremes, high, low, offset, found, n, tiles,
                **constants, **columns, ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        settle[(triton.cdiv(n, BLOCK),)](
            features, extremes, centroids if split else high, found, assignment, n, len(centroids),
            **constants, **columns, ROWS=BLOCK,
        )  # fmt: skip
    return assignment


@triton.jit
def _scale(extremes):
    """Return the power of two, within 2^-60 to 2^60, that brings the largest absolute value to [2^14, 2^15).

    It is computed on the bits of fp32, in which the exponent, biased by 127, stands above 23 bits of mantissa.
    """
    largest = tl.maximum(-tl.load(extremes), tl.load(extremes + 1)).to(tl.float32)
    exponent = 127 + 14 + 127 - (largest.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 127 - 60), 127 + 60)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _of_points(extremes, SPLIT: tl.constexpr):
    """Return what points are multiplied by: 1 for fp16, which is taken as it is."""
    if SPLIT:
        return _scale(extremes + 2)
    else:
        return 1.0


@triton.jit(do_not_specialize=["k", "padded"])
def prepare(
    centroids, extremes, high, low, offset, k, padded,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write high and low [padded, WIDTH] and offset [padded]. The grid is blocks of centroids."""
    ids = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    valid = ids < k
    scale = _scale(extremes)
    rows = tl.load(centroids + ids[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    rows *= scale
    rounded = rows.to(tl.float16)
    stored = ids < padded
    places = ids[:, None] * WIDTH + d[None, :]
    tl.store(high + places, rounded, mask=stored[:, None])
    if SPLIT:
        tl.store(low + places, (rows - rounded.to(tl.float32)).to(tl.float16), mask=stored[:, None])
    else:
        rows = rounded.to(tl.float32)
    # Both factors of a product x . c are scaled, so -|c|^2 / 2 must be scaled by both too.
    norm = tl.sum(rows * rows, axis=1)
    start = tl.where(valid, -0.5 * norm * (_of_points(extremes, SPLIT) / scale), NOTHING)
    tl.store(offset + ids, start, mask=stored)


@triton.jit(do_not_specialize=["n", "tiles"])
def sweep(
    points, extremes, high, low, offset, found, n, tiles,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write found [n] int32: tile * CLASSES + class of the largest score. The grid is tiles of points.

    All programs go through the centroids at the same pace, so that they find them in the L2 cache.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (rows < n)[:, None] & (d < D)[None, :]
    x = tl.load(points + rows[:, None] * D + d[None, :], mask=mask, other=0.0)
    x_low = x
    if SPLIT:
        x *= _of_points(extremes, SPLIT)
        x_low = (x - x.to(tl.float16).to(tl.float32)).to(tl.float16)
        x = x.to(tl.float16)

    largest = tl.full([ROWS, CLASSES], float("-inf"), tl.float32)
    tile_of_largest = tl.zeros([ROWS, CLASSES], tl.int32)
    columns = tl.arange(0, COLUMNS)
    # Offsets are loaded one tile ahead. The compiler copies centroids to shared memory before they are needed, but it
    # loads these into registers, where the program would wait for them.
    start = tl.load(offset + columns)
    for tile in range(0, tiles):
        ids = tile * COLUMNS + columns
        places = ids.to(tl.int64)[:, None] * WIDTH + d[None, :]
        c = tl.load(high + places)
        next_start = tl.load(offset + COLUMNS + ids)
        scores = tl.broadcast_to(start[None, :], [ROWS, COLUMNS])
        if SPLIT:
            c_low = tl.load(low + places)
            scores = tl.dot(x_low, tl.trans(c), scores)
            scores = tl.dot(x, tl.trans(c_low), scores)
        scores = tl.dot(x, tl.trans(c), scores)
        start = next_start

        by_class = tl.reshape(scores, [ROWS, COLUMNS // (2 * CLASSES), CLASSES, 2])
        largest_here = tl.max(tl.max(by_class, axis=3), axis=1)
        better = largest_here > largest
        largest = tl.where(better, largest_here, largest)
        tile_of_largest = tl.where(better, tile, tile_of_largest)

    found_here = tile_of_largest * CLASSES + tl.arange(0, CLASSES)[None, :]
    best = largest == tl.max(largest, axis=1)[:, None]
    tl.store(found + rows, tl.min(tl.where(best, found_here, 2147483647), axis=1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "k"])
def settle(
    points, extremes, centroids, found, assignment, n, k,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write assignment [n] int32: the nearest among the candidates, which are the columns of the class in `found`.

    For points of fp32 `centroids` is [k, D] fp32; otherwise it is `high` of `prepare`, [padded, WIDTH] fp16, rounded
    and scaled. The grid is blocks of points.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    valid = rows < n
    wide = (d < D)[None, :]
    x = tl.load(points + rows[:, None] * D + d[None, :], mask=valid[:, None] & wide, other=0.0).to(tl.float32)
    tile_and_class = tl.load(found + rows, mask=valid, other=0)
    first = (tile_and_class // CLASSES) * COLUMNS + (tile_and_class % CLASSES) * 2
    STRIDE: tl.constexpr = D if SPLIT else WIDTH
    unit = 1.0
    if not SPLIT:
        unit = 1.0 / _scale(extremes)

    least = tl.full([ROWS], float("inf"), tl.float32)
    choice = first
    for candidate in tl.static_range(0, COLUMNS // CLASSES):
        ids = first + (candidate // 2) * (2 * CLASSES) + candidate % 2
        known = valid & (ids < k)
        c = tl.load(centroids + ids.to(tl.int64)[:, None] * STRIDE + d[None, :], mask=known[:, None] & wide, other=0.0)
        difference = x - c.to(tl.float32) * unit
        distance = tl.where(known, tl.sum(difference * difference, axis=1), float("inf"))
        choice = tl.where(distance < least, ids, choice)
        least = tl.minimum(distance, least)
    tl.store(assignment + rows, choice, mask=valid)
