"""The kernels of batch_norm.py, where it says what they are for.

Activations are [groups x rows, channels], channels side by side: an image in channels_last. A program has `part_rows`
of them and COLUMNS channels. It takes WORD_ROWS x ROWS rows at a time, each thread 16 bytes of WORD_ROWS of them, and
keeps its sums by thread: reshapes and sums over the WORD_ROWS move nothing. Threads are added up once, at its end.

What is known of a group's channels is one line of a matrix of `width` float32: means, variances (biased), at 2 x
channels the number of values of a channel, and three zeros.
"""

# No `from __future__ import annotations` here: Triton 3.1's interpreter would not recognise a tl.constexpr.
import triton
import triton.language as tl

# A word of kept bits is of 8 channels of so many rows: those that a thread has, when it takes as many at a time.
WORD_ROWS = tl.constexpr(4)
_SIZES = ["rows", "part_rows", "parts", "groups"]


@triton.jit
def _range(rows, part_rows):
    """Return the first row of this program in its group and the number of its rows."""
    begin = tl.program_id(0) * part_rows
    return begin, tl.minimum(begin + part_rows, rows) - begin


@triton.jit
def _own_columns(channels, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return column, column < channels


@triton.jit
def _words(rows, channels):
    """Return how many words of a group are kept, and of WORD_ROWS of its rows: see `_words_place`."""
    of_rows = (channels + 7) // 8
    return (rows + (WORD_ROWS - 1)) // WORD_ROWS * of_rows, of_rows


@triton.jit
def _over_lanes(count, mean, squares):
    """Combine lanes (Chan et al. 1979): counts [L, 1], means and sums of squared deviations [L, C]."""
    total = tl.sum(count, axis=0)
    share = count / total[None, :]
    centre = tl.sum(share * mean, axis=0)
    centre += tl.sum(share * (mean - centre[None, :]), axis=0)  # what rounding took from a large mean
    distance = mean - centre[None, :]
    return total, centre, tl.sum(squares + count * distance * distance, axis=0) / total


@triton.jit
def _store_count(place, count):
    """Count [1], and zeros to the end of the line."""
    entry = tl.arange(0, 4)
    tl.store(place + entry, tl.where(entry == 0, count, 0.0))


@triton.jit(do_not_specialize=_SIZES)
def partial_statistics(
    x, partial, rows, channels, part_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one line of `partial` [groups, parts, width]. Grid: parts, blocks of channels, groups.

    Moves: reads x; writes 8 bytes a channel and part, and 16 a part.
    """
    begin, length = _range(rows, part_rows)
    column, inside = _own_columns(channels, COLUMNS)
    group = tl.program_id(2)
    x += (group.to(tl.int64) * rows + begin) * channels
    row = tl.arange(0, WORD_ROWS * ROWS)
    lane = tl.arange(0, ROWS)[:, None]
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, length, WORD_ROWS * ROWS):
        mask = (first + row < length)[:, None] & inside[None, :]
        place = first * channels + (row[:, None] * channels + column[None, :])
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.reshape(value, (WORD_ROWS, ROWS, COLUMNS))
        # A mask of the same shape: another's layout would have all values moved to it.
        valid = tl.reshape(mask, (WORD_ROWS, ROWS, COLUMNS))
        new = tl.minimum(tl.maximum(length - first - lane + (ROWS - 1), 0) // ROWS, WORD_ROWS).to(tl.float32)
        mean_here = tl.sum(value, axis=0) / tl.maximum(new, 1.0)
        distance = tl.where(valid, value - mean_here[None, :, :], 0.0)
        squares_here = tl.sum(distance * distance, axis=0)
        share = new / tl.maximum(count + new, 1.0)
        step = mean_here - mean
        mean += step * share
        squares += squares_here + step * step * (count * share)
        count += new
    total, mean_of_all, variance = _over_lanes(count, mean, squares)
    line = partial + (group * tl.num_programs(0) + tl.program_id(0)) * width
    tl.store(line + column, mean_of_all, mask=inside)
    tl.store(line + channels + column, variance, mask=inside)
    if tl.program_id(1) == 0:
        _store_count(line + 2 * channels, total)


@triton.jit(do_not_specialize=_SIZES)
def merge_statistics(
    partial, statistics, running_mean, running_var, batches, groups, parts, channels, width, momentum,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, TRACK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Write `statistics` [groups, width], move the running ones and add one to `batches`. Grid: 1, blocks of channels.

    Moves: reads 8 bytes a channel and part, and 4 a part and block; writes a line a group; reads and writes the running
    statistics.
    """
    column, inside = _own_columns(channels, COLUMNS)
    lane = tl.arange(0, PARTS)
    mean_of_groups = tl.zeros([COLUMNS], tl.float32)
    variance_of_groups = tl.zeros([COLUMNS], tl.float32)
    for group in range(groups):
        count = tl.zeros([PARTS, 1], tl.float32)
        mean = tl.zeros([PARTS, COLUMNS], tl.float32)
        squares = tl.zeros([PARTS, COLUMNS], tl.float32)
        for first in range(0, parts, PARTS):
            valid = first + lane < parts
            line = partial + (group * parts + first + lane) * width
            mask = valid[:, None] & inside[None, :]
            new = tl.load(line + 2 * channels, mask=valid, other=0.0)[:, None]
            place = line[:, None] + column[None, :]
            step = tl.load(place, mask=mask, other=0.0) - mean
            variance_here = tl.load(place + channels, mask=mask, other=0.0)
            share = new / tl.maximum(count + new, 1.0)
            mean += step * share
            squares += new * variance_here + step * step * (count * share)
            count += new
        total, mean_of_all, variance = _over_lanes(count, mean, squares)
        line_out = statistics + group * width
        tl.store(line_out + column, mean_of_all, mask=inside)
        tl.store(line_out + channels + column, variance, mask=inside)
        if tl.program_id(1) == 0:
            _store_count(line_out + 2 * channels, total)
        mean_of_groups += mean_of_all
        variance_of_groups += variance * (total / tl.maximum(total - 1.0, 1.0))
    if TRACK:
        before = tl.load(running_mean + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_mean + column, before + momentum * (mean_of_groups / groups - before), mask=inside)
        before = tl.load(running_var + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(running_var + column, before + momentum * (variance_of_groups / groups - before), mask=inside)
    if COUNT:  # noqa: SIM102 (what is known when this is compiled stands alone)
        if tl.program_id(1) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _coefficients(statistics, weight, bias, column, inside, channels, eps):
    """Return mean, 1 / deviation, weight and bias of channels, so that bn(x) = (x - mean) (weight / deviation) + bias.

    Not as x a + b: where a mean is large, that is the difference of two large numbers.
    """
    mean = tl.load(statistics + column, mask=inside, other=0.0)
    variance = tl.load(statistics + channels + column, mask=inside, other=0.0)
    one = tl.full(variance.shape, 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.sqrt_rn(variance + eps))
    scale = inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return mean, inverse, scale, tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def normalise_rows(
    x, residual, weight, bias, statistics, y, kept, rows, channels, part_rows, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y = act(bn(x) + residual). Grid: parts, blocks of channels, groups.

    Moves: reads x (and the residual), writes y; KEEP: writes one bit a value; reads 16 bytes a channel and part.
    """
    begin, length = _range(rows, part_rows)
    column, inside = _own_columns(channels, COLUMNS)
    group = tl.program_id(2)
    start = group.to(tl.int64) * rows + begin
    x += start * channels
    y += start * channels
    if RESIDUAL:
        residual += start * channels
    if KEEP:
        of_group, of_rows = _words(rows, channels)
        kept += group.to(tl.int64) * of_group + begin // WORD_ROWS * of_rows
    mean, _, scale, shift = _coefficients(statistics + group * width, weight, bias, column, inside, channels, eps)
    TILE: tl.constexpr = WORD_ROWS * ROWS
    row = _rows_of_threads(ROWS)
    for first in range(0, length, TILE):
        mask = (first + row < length)[:, None] & inside[None, :]
        place = first * channels + (row[:, None] * channels + column[None, :])
        value = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        value += shift[None, :]
        if RESIDUAL:
            value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # NaN stays
        out = value.to(y.dtype.element_ty)
        tl.store(y + place, out, mask=mask)
        if KEEP:
            bits = tl.reshape(_passes(out).to(tl.int32), (WORD_ROWS, ROWS, COLUMNS // 8, 8)) << _bit_place()
            at, there = _words_place(first, length, channels, ROWS, COLUMNS)
            words = tl.sum(tl.sum(bits, axis=3), axis=0)
            # There and back: what Triton 3.1's interpreter adds up is int64, and it would be stored so.
            tl.store(kept + at, words.to(tl.int64).to(tl.int32), mask=there)


@triton.jit
def _passes(y):
    """Return where ReLU lets the gradient through, given its result: as PyTorch, where y is NaN too."""
    return (y <= 0) == 0


@triton.jit
def _bit_place():
    """Return [WORD_ROWS, 1, 1, 8]: where the bit of a row and a channel stands in their word."""
    return tl.arange(0, WORD_ROWS)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]


@triton.jit
def _words_place(first, length, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where the words [ROWS, COLUMNS / 8] of a tile are, counted from the program's, and which of them are."""
    _, of_rows = _words(length, channels)
    line = tl.arange(0, ROWS)
    word = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    there = (first + line * WORD_ROWS < length)[:, None] & (word < of_rows)[None, :]
    return first // WORD_ROWS * of_rows + (line[:, None] * of_rows + word[None, :]), there


@triton.jit
def _rows_of_threads(ROWS: tl.constexpr):
    """Return the rows of a tile in the order in which it is held: a thread has every ROWS-th of them, and these are to
    be neighbours, for a word to be one thread's.
    """
    held = tl.arange(0, WORD_ROWS * ROWS)
    return held % ROWS * WORD_ROWS + held // ROWS


@triton.jit(do_not_specialize=_SIZES)
def partial_sums(
    dy, second, x, kept, weight, bias, statistics, stored, partial, rows, channels, part_rows, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SECOND: tl.constexpr, KEPT: tl.constexpr, RELU: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Write the sums of g and of g (x - mean) to a line of `partial` [groups, parts, 2 channels], where g is dy
    (SECOND: plus the second gradient), and 0 where ReLU was 0. Grid: parts, blocks of channels, groups.

    Moves: reads x and dy (and the second); KEPT: reads one bit a value; WRITE: writes g to `stored`; reads 16 and
    writes 8 bytes a channel and part.
    """
    begin, length = _range(rows, part_rows)
    column, inside = _own_columns(channels, COLUMNS)
    group = tl.program_id(2)
    start = group.to(tl.int64) * rows + begin
    x += start * channels
    dy += start * channels
    if SECOND:
        second += start * channels
    if KEPT:
        of_group, of_rows = _words(rows, channels)
        kept += group.to(tl.int64) * of_group + begin // WORD_ROWS * of_rows
    if WRITE:
        stored += start * channels
    mean, _, scale, shift = _coefficients(statistics + group * width, weight, bias, column, inside, channels, eps)
    TILE: tl.constexpr = WORD_ROWS * ROWS
    row = _rows_of_threads(ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, length, TILE):
        mask = (first + row < length)[:, None] & inside[None, :]
        place = first * channels + (row[:, None] * channels + column[None, :])
        g = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        if SECOND:
            g += tl.load(second + place, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if KEPT:
            at, there = _words_place(first, length, channels, ROWS, COLUMNS)
            bits = (tl.load(kept + at, mask=there, other=0)[None, :, :, None] >> _bit_place()) & 1
            g = tl.where(tl.reshape(bits, (TILE, COLUMNS)) != 0, g, 0.0)
        elif RELU:
            g = _masked(g, centred, scale, shift, x)
        if WRITE:
            rounded = g.to(stored.dtype.element_ty)
            tl.store(stored + place, rounded, mask=mask)
            g = rounded.to(tl.float32)
        total += tl.sum(tl.reshape(g, (WORD_ROWS, ROWS, COLUMNS)), axis=0)
        product += tl.sum(tl.reshape(g * centred, (WORD_ROWS, ROWS, COLUMNS)), axis=0)
    line = partial + (group * tl.num_programs(0) + tl.program_id(0)) * (2 * channels)
    tl.store(line + column, tl.sum(total, axis=0), mask=inside)
    tl.store(line + channels + column, tl.sum(product, axis=0), mask=inside)


@triton.jit
def _masked(g, centred, scale, shift, x):
    """Return g where relu(bn(x)) lets it through: computed as in `normalise_rows`, and rounded as there."""
    y = (centred * scale[None, :] + shift[None, :]).to(x.dtype.element_ty)
    return tl.where(_passes(y), g, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def merge_sums(
    partial, statistics, sums, d_weight, d_bias, groups, parts, channels, width, eps,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sums [groups, 2 channels] of all parts, and the gradients of weight and bias. Grid: 1, blocks of
    channels.

    Moves: reads `partial` and the groups' variances; writes a line a group and 8 bytes a channel.
    """
    column, inside = _own_columns(channels, COLUMNS)
    lane = tl.arange(0, PARTS)
    of_weight = tl.zeros([COLUMNS], tl.float32)
    of_bias = tl.zeros([COLUMNS], tl.float32)
    for group in range(groups):
        total = tl.zeros([PARTS, COLUMNS], tl.float32)
        product = tl.zeros([PARTS, COLUMNS], tl.float32)
        for first in range(0, parts, PARTS):
            mask = (first + lane < parts)[:, None] & inside[None, :]
            place = partial + (group * parts + first + lane)[:, None] * (2 * channels) + column[None, :]
            total += tl.load(place, mask=mask, other=0.0)
            product += tl.load(place + channels, mask=mask, other=0.0)
        total_of_all = tl.sum(total, axis=0)
        product_of_all = tl.sum(product, axis=0)
        line_out = sums + group * (2 * channels)
        tl.store(line_out + column, total_of_all, mask=inside)
        tl.store(line_out + channels + column, product_of_all, mask=inside)
        variance = tl.load(statistics + group * width + channels + column, mask=inside, other=0.0)
        of_weight += product_of_all / tl.sqrt_rn(variance + eps)
        of_bias += total_of_all
    tl.store(d_weight + column, of_weight, mask=inside)
    tl.store(d_bias + column, of_bias, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def differentiate_rows(
    g, x, weight, bias, statistics, sums, dx, rows, channels, part_rows, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RELU: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """dx = weight / deviation (g - mean of g - (x - mean) mean of g (x - mean) / variance); without TRAINING, where
    mean and variance are constants, weight / deviation g. Grid: parts, blocks of channels, groups.

    Moves: reads g and x, writes dx; reads 24 bytes a channel and part, and 4 a part.
    """
    begin, length = _range(rows, part_rows)
    column, inside = _own_columns(channels, COLUMNS)
    group = tl.program_id(2)
    start = (group.to(tl.int64) * rows + begin) * channels
    g += start
    x += start
    dx += start
    own = statistics + group * width
    mean, inverse, scale, shift = _coefficients(own, weight, bias, column, inside, channels, eps)
    if TRAINING:
        count = tl.load(own + 2 * channels)
        line = sums + group * (2 * channels)
        average = tl.load(line + column, mask=inside, other=0.0) / count
        slope = tl.load(line + channels + column, mask=inside, other=0.0) / count * (inverse * inverse)
    TILE: tl.constexpr = WORD_ROWS * ROWS
    row = _rows_of_threads(ROWS)
    for first in range(0, length, TILE):
        mask = (first + row < length)[:, None] & inside[None, :]
        place = first * channels + (row[:, None] * channels + column[None, :])
        flow = tl.load(g + place, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            flow = _masked(flow, centred, scale, shift, x)
        if TRAINING:
            flow = flow - average[None, :] - centred * slope[None, :]
        tl.store(dx + place, (flow * scale[None, :]).to(dx.dtype.element_ty), mask=mask)
