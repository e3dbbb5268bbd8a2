"""The pass over the banks: scores, running softmax and the softmax-weighted mean of the columns, tile by tile. See
contrast.py.
"""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
import triton
import triton.language as tl
from pcl_fast.kernels.sampling import per_slot, pick
from pcl_fast.kernels.tiles import HIDDEN, LOG2E, LOWEST, OLD_TRITON, load_rows, reciprocal, store_rows

# What the largest product of exponential and weight is scaled to when it becomes an operand.
SHARE_SCALE = tl.constexpr(32768.0)
# What fp32 features are multiplied by before they are split into two fp16 numbers: entries must be below
# 65504 / 1024 = 64.
FEATURE_SCALE = tl.constexpr(1024.0)
# Whether a numerator in half precision is scaled and then added to by the product itself. On Volta a product has its
# own layout, and adding up outside of it would take half as much shared memory again.
IN_PLACE = tl.constexpr(OLD_TRITON)


@triton.jit
def _operands(x, OPERAND: tl.constexpr, DOT: tl.constexpr):
    """Return x as the matrix units take it: (x, x) in a half-precision type, or (high, low), the two fp16 numbers whose
    sum is an fp32 number.

    DOT is the operand type, except for bf16 in Triton's interpreter, which cannot multiply bf16: there the rounded
    values are multiplied in fp32.
    """
    if OPERAND == tl.float32:
        high = x.to(tl.float16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.float16)
    else:
        high = x.to(OPERAND).to(DOT)
        low = high
    return high, low


@triton.jit
def _features(x, OPERAND: tl.constexpr, DOT: tl.constexpr):
    """Return `_operands` of features. fp32 features are scaled, so that `low` is not among fp16's subnormal numbers."""
    if OPERAND == tl.float32:
        x = x.to(tl.float32) * FEATURE_SCALE
    return _operands(x, OPERAND, DOT)


@triton.jit
def _product(x, x_low, y, y_low, accumulator, OPERAND: tl.constexpr):
    """Return accumulator + x y in fp32. Of split numbers the product low x low is left out, which is below fp32's
    resolution.
    """
    if OPERAND == tl.float32:
        accumulator = tl.dot(x_low, y, accumulator)
        accumulator = tl.dot(x, y_low, accumulator)
    return tl.dot(x, y, accumulator)


@triton.jit
def _scores(
    query, rows, row_valid, matrix, ids, valid, scores,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Return scores [rows, ids] + the products of rows of `query` and `matrix`, BLOCK_D of their entries at a time."""
    for first in range(0, D, BLOCK_D):
        x, x_low = _features(load_rows(query, rows, row_valid, first, D, BLOCK_D), OPERAND, DOT)
        y, y_low = _features(load_rows(matrix, ids, valid, first, D, BLOCK_D), OPERAND, DOT)
        scores = _product(x, x_low, tl.trans(y), tl.trans(y_low), scores, OPERAND)
    return scores


@triton.jit
def _positives(
    query, key, bank, rows, own, valid, weight, is_queue, scores, positives, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store, for a tile of rows, s+ [n] and the entries of w+ p [n, D] from `first` on.

    s+ is taken from the diagonal of a matrix product like that of the negatives. If it were summed in another order,
    rounding could put it above the negatives' scores where all are equal, and a collapsed encoder would be right.
    """
    of_key, of_bank = valid & is_queue, valid & (is_queue == 0)
    positive = load_rows(key, rows, of_key, first, D, BLOCK_D).to(tl.float32)
    positive += load_rows(bank, own, of_bank, first, D, BLOCK_D).to(tl.float32)
    store_rows(positives, rows, positive * weight[:, None], valid, first, D, BLOCK_D)
    if first == 0:
        products = tl.zeros([ROWS, ROWS], tl.float32)
        products = _scores(query, rows, valid, key, rows, of_key, products, D, BLOCK_D, OPERAND, DOT)
        products = _scores(query, rows, valid, bank, own, of_bank, products, D, BLOCK_D, OPERAND, DOT)
        products *= (weight * _score_unit(OPERAND))[None, :]
        line = tl.arange(0, ROWS)
        diagonal = tl.sum(tl.where(line[:, None] == line[None, :], products, 0.0), axis=1)
        tl.store(scores + rows, diagonal, mask=valid)


@triton.jit
def _score_unit(OPERAND: tl.constexpr):
    """Return what weight x product is multiplied by to be a score in units of log 2."""
    if OPERAND == tl.float32:
        return LOG2E / (FEATURE_SCALE * FEATURE_SCALE)
    else:
        return LOG2E


@triton.jit(do_not_specialize=[*per_slot("length", "begin"), "n", "stride", "first_bank", "first_part", "part_columns"])
def stream(
    query, key, index, bank0, bank1, bank2, bank3,
    concentration0, concentration1, concentration2, concentration3,
    assignment0, assignment1, assignment2, assignment3,
    length0, length1, length2, length3, begin0, begin1, begin2, begin3,
    list_ids, list_weights, queue_weight, maxima, sums, numerators, scores, positives, ends,
    n, stride, first_bank, first_part, part_columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    USED: tl.constexpr, QUEUE: tl.constexpr, OPERAND: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Go through one part of a bank for one tile of rows per program, and write what `contrast._State` describes.

    The grid is (parts of the launch's banks x tiles of rows, blocks of D). Neighbouring programs work on the same part,
    and so share the cache. A program adds up BLOCK_D entries of the gradient, because registers do not hold more; where
    D is larger, the programs for one tile of rows all compute the same scores.

    The state of a row is the largest score so far, the sum of exponentials relative to it, and the numerator of the
    weighted mean in multiples of unit / SHARE_SCALE (and of 1 / FEATURE_SCALE for fp32), where unit is the largest
    weight so far.
    """
    row_tiles = tl.cdiv(n, ROWS)
    part = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    row_valid = rows < n
    first = tl.program_id(1) * BLOCK_D

    slot = part * 0
    for other in tl.static_range(1, USED):
        slot += (part >= pick(other, begin0, begin1, begin2, begin3, USED)).to(tl.int32)
    bank = pick(slot, bank0, bank1, bank2, bank3, USED)
    concentration = pick(slot, concentration0, concentration1, concentration2, concentration3, USED)
    assignment = pick(slot, assignment0, assignment1, assignment2, assignment3, USED)
    length = pick(slot, length0, length1, length2, length3, USED)
    part_of_bank = part - pick(slot, begin0, begin1, begin2, begin3, USED)
    is_queue = (slot == 0) & QUEUE
    number = first_bank + slot

    # No row has its own prototype among the keys of the queue: own = -1 hides nothing there.
    image = tl.load(index + rows, mask=row_valid & (is_queue == 0), other=0)
    own = tl.load(assignment + image, mask=row_valid & (is_queue == 0), other=-1).to(tl.int32)
    if part_of_bank == 0:
        phi = tl.load(concentration + own, mask=row_valid & (is_queue == 0), other=1.0)
        _positives(
            query, key, bank, rows, own, row_valid, tl.where(is_queue, queue_weight, reciprocal(phi)), is_queue,
            scores + number * n, positives + number.to(tl.int64) * n * D, first,
            D, BLOCK_D, ROWS, OPERAND, DOT,
        )  # fmt: skip

    if D <= BLOCK_D:
        queries, queries_low = _features(load_rows(query, rows, row_valid, 0, D, BLOCK_D), OPERAND, DOT)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, BLOCK_D], tl.float32)
    unit = 1e-30
    start_of_list = (slot - QUEUE).to(tl.int64) * stride
    begin = part_of_bank * part_columns
    end = tl.minimum(begin + part_columns, length)
    for start in range(begin, end, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        valid = place < end
        listed = valid & (is_queue == 0)
        ids = tl.load(list_ids + start_of_list + place, mask=listed, other=0)
        ids = tl.where(is_queue, place, ids)
        weight = tl.load(list_weights + start_of_list + place, mask=listed, other=0.0)
        weight = tl.where(is_queue & valid, queue_weight, weight)

        # A hidden score is not selected afterwards: its sum starts so low that nothing it adds up matters.
        seen = (weight != 0)[None, :] & (own[:, None] != ids[None, :])
        products = tl.where(seen, 0.0, HIDDEN)
        columns, columns_low = _features(load_rows(bank, ids, valid, first, D, BLOCK_D), OPERAND, DOT)
        if D <= BLOCK_D:
            products = _product(queries, queries_low, tl.trans(columns), tl.trans(columns_low), products, OPERAND)
        else:
            products = _scores(query, rows, row_valid, bank, ids, valid, products, D, BLOCK_D, OPERAND, DOT)
        tile = products * (tl.where(weight != 0, weight, 1.0) * _score_unit(OPERAND))[None, :]
        new_largest = tl.maximum(largest, tl.max(tile, axis=1))
        exponentials = tl.exp2(tile - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(exponentials, axis=1)

        new_unit = tl.maximum(unit, tl.max(weight, axis=0))
        share, share_low = _operands(exponentials * (weight * (SHARE_SCALE / new_unit))[None, :], OPERAND, DOT)
        # The hardware's quotient of two equal numbers may be below 1.
        change = (decay * tl.where(unit == new_unit, 1.0, unit / new_unit))[:, None]
        if IN_PLACE and OPERAND != tl.float32:
            numerator = _product(share, share_low, columns, columns_low, numerator * change, OPERAND)
        else:
            # An fma, because the compiler would turn a plain sum back into the accumulator of the product.
            here = tl.zeros([ROWS, BLOCK_D], tl.float32)
            here = _product(share, share_low, columns, columns_low, here, OPERAND)
            numerator = tl.fma(numerator, tl.broadcast_to(change, numerator.shape), here)
        largest = new_largest
        unit = new_unit

    line = (first_part + part).to(tl.int64) * n + rows
    if OPERAND == tl.float32:
        unit /= FEATURE_SCALE
    store_rows(numerators, line, numerator * (unit / SHARE_SCALE), row_valid, first, D, BLOCK_D)
    if first == 0:
        tl.store(maxima + line, largest, mask=row_valid)
        tl.store(sums + line, total, mask=row_valid)
        if begin + part_columns >= length:
            tl.store(ends + number, first_part + part + 1)
