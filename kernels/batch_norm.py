"""Batch norm, and the residual and ReLU that follow it, without a pass of their own over the activations.

Forward in training:
partial_statistics  Program (part of the rows, block of channels, group) keeps mean and sum of squared deviations by
                    thread, several rows at a time, and combines them (Chan et al. 1979): nothing is the difference of
                    large sums, so that a channel of large mean and small variance has its variance.
merge_statistics    combines the parts, moves the running statistics and counts the batch. With an exchange between
                    ranks it runs twice: for the parts of a rank, then for the lines of all ranks.
normalise_rows      y = relu(bn(x) + residual). With a residual it also writes a bit a value: is y > 0? Without one the
                    backward pass computes that again from x.
Backward:
partial_sums        sums over the rows of g and of g (x - mean), where g is the gradient behind the ReLU. With a
                    residual g is written: it is the residual's gradient, and `differentiate_rows` reads it. Where y
                    went two ways (fork), their gradients are added here.
merge_sums          adds up the parts: the gradients of weight and bias, and what all ranks add up with an exchange.
differentiate_rows  dx.

No atomics, no host synchronisation, the same bits every run on the same kind of GPU.

Bytes moved, with V = N H W C values of b bytes, beside what is little, some numbers a channel and part:
    forward   x twice, y                                               3 b V
              with a residual: x twice, residual, y, bits              4 b V + V / 8 (no bits without a gradient)
    backward  x twice, dy twice, dx                                    5 b V
              with a residual: x twice, dy, bits, g there and back, dx 6 b V + V / 8
              with a fork: also the second dy                          7 b V + V / 8
PyTorch moves, with a residual and ReLU, 8 b V forward and 8 b V backward, or 11 b V where two gradients meet.
`bytes_moved` is this formula for each kernel, to the byte; tests compare what the kernels load and store.

Numerics. Statistics, sums and all between load and store are float32. y, g and dx are rounded once each, where PyTorch
rounds bn(x) before it adds the residual.
"""

# Not with postponed annotations: Triton 3.1's interpreter would not know a tl.constexpr.
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from pcl_fast.kernels import batch_norm_function
from pcl_fast.kernels.batch_norm_function import Exchange, Operations, Settings, line_width, stores_gradient
from pcl_fast.kernels.batch_norm_kernels import (
    WORD_ROWS,
    differentiate_rows,
    merge_statistics,
    merge_sums,
    normalise_rows,
    partial_statistics,
    partial_sums,
)
from pcl_fast.kernels.launch import multiprocessors, on

WARPS = 4
UNROLL = WORD_ROWS.value  # rows that a thread loads before it needs the first
PROGRAMS = 4  # on a multiprocessor
SUMMED, MAPPED = 64, 256  # channels of a program that adds up rows, and of one that only maps values
MERGED = {"PARTS": 128, "COLUMNS": 8, "num_warps": 8}  # lines and channels at a time


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    splits: int = 1,
    exchange: Exchange | None = None,
    fork: bool = False,
    batches: torch.Tensor | None = None,
):
    """Return y = relu(bn(x) + residual), bn(x) = (x - mean) / sqrt(variance + eps) weight + bias.

    Differentiable, once, in x, weight, bias and residual. If none of them needs a gradient, nothing is kept.

    Args:
        x: [N, C, H, W] float16, bfloat16 or float32, in channels_last or copied to it.
        weight, bias: [C] of any floating dtype.
        running_mean, running_var: [C]; in training they are moved by `momentum` towards the batch's mean and unbiased
            variance, in place, or left out with None; otherwise they are taken for the batch's.
        residual: like x; None to add nothing.
        relu: False for y = bn(x) + residual.
        training: whether mean and variance are the batch's.
        splits: this many equal consecutive parts of the batch are each normalised by themselves, as so many ranks
            would; the running statistics move towards the mean of theirs.
        exchange: mean and variance are those of all ranks' values, of which each rank has at least one a channel.
            weight and bias get the gradients of the rank's own.
        fork: return y twice, for two consumers, whose gradients the backward pass adds itself if there is a residual:
            the next block's first convolution and its shortcut. The two share their memory.
        batches: [], int64: in training one is added, in place; None to count nothing.

    Returns:
        y like x, in channels_last; a pair of them with `fork`.

    Raises:
        ValueError: shapes or types do not fit; the batch does not divide into the parts; a channel of a part has fewer
            than two values in training.
    """
    settings = Settings(relu, training, momentum, eps, splits, exchange, fork)
    return batch_norm_function.run(
        OPERATIONS, x, weight, bias, (running_mean, running_var, batches), residual, settings
    )


# --- operators ----------------------------------------------------------------------------------------------------
# torch.compile does not look into these. They are defined by Library and not by custom_op, whose checks cost 0.2 ms a
# call.

_library = torch.library.Library("pcl_fast", "FRAGMENT")
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches"
for _schema in (
    f"batch_norm_statistics(Tensor x, {_RUNNING}, float momentum, SymInt splits) -> Tensor",
    f"batch_norm_merge(Tensor lines, {_RUNNING}, float momentum) -> Tensor",
    "batch_norm_apply(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor statistics, bool relu, float eps, "
    "bool keep) -> (Tensor y, Tensor kept)",
    "batch_norm_sums(Tensor dy, Tensor? second, Tensor x, Tensor? kept, Tensor weight, Tensor bias, Tensor statistics, "
    "bool relu, float eps) -> (Tensor sums, Tensor d_weight, Tensor d_bias, Tensor g)",
    "batch_norm_differentiate(Tensor g, Tensor x, Tensor weight, Tensor bias, Tensor statistics, Tensor sums, "
    "bool relu, bool training, float eps) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _new_statistics(x, running_mean, running_var, batches, momentum, splits):
    return x.new_empty((splits, line_width(x.shape[1])), dtype=torch.float32)


def _new_merged(lines, running_mean, running_var, batches, momentum):
    return lines.new_empty((1, lines.shape[1]))


def _new_outputs(x, residual, weight, bias, statistics, relu, eps, keep):
    groups, channels = statistics.shape[0], x.shape[1]
    words = (groups, -(-(x.numel() // channels // groups) // UNROLL), -(-channels // 8)) if keep else 0
    return _new_like(x), x.new_empty(words, dtype=torch.int32)


def _new_sums(dy, second, x, kept, weight, bias, statistics, relu, eps):
    sums = statistics.new_empty((statistics.shape[0], 2 * x.shape[1]))
    g = _new_like(x) if stores_gradient(second, kept) else x.new_empty(0)
    return sums, torch.empty_like(weight), torch.empty_like(bias), g


def _new_dx(g, x, weight, bias, statistics, sums, relu, training, eps):
    return _new_like(x)


def _new_like(x):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _statistics(x, running_mean, running_var, batches, momentum, splits):
    shape = _Shape.of(x, splits)
    launch = shape.summed(x)
    lines = x.new_empty((splits, launch.parts, line_width(shape.channels)), dtype=torch.float32)
    with on(x):
        partial_statistics[launch.grid(splits)](
            x, lines, shape.rows, shape.channels, launch.part_rows, lines.shape[2], **launch.constants()
        )
        return _merged(lines, running_mean, running_var, batches, momentum)


def _merge(lines, running_mean, running_var, batches, momentum):
    with on(lines):
        return _merged(lines.contiguous()[None], running_mean, running_var, batches, momentum)


def _merged(lines, running_mean, running_var, batches, momentum):
    groups, parts, width = lines.shape
    channels = (width - line_width(0)) // 2
    statistics = lines.new_empty((groups, width))
    merge_statistics[_blocks(channels)](
        lines, statistics, running_mean, running_var, batches, groups, parts, channels, width, momentum,
        **MERGED, TRACK=running_mean is not None, COUNT=batches is not None,
    )  # fmt: skip
    return statistics


def _apply(x, residual, weight, bias, statistics, relu, eps, keep):
    y, kept = outputs = _new_outputs(x, residual, weight, bias, statistics, relu, eps, keep)
    groups = len(statistics)
    shape = _Shape.of(x, groups)
    launch = shape.mapped(x)
    with on(x):
        normalise_rows[launch.grid(groups)](
            x, residual, weight, bias, statistics, y, kept, shape.rows, shape.channels, launch.part_rows,
            statistics.shape[1], eps, **launch.constants(), RESIDUAL=residual is not None, RELU=relu, KEEP=keep,
        )  # fmt: skip
    return outputs


def _sums(dy, second, x, kept, weight, bias, statistics, relu, eps):
    sums, d_weight, d_bias, g = outputs = _new_sums(dy, second, x, kept, weight, bias, statistics, relu, eps)
    groups, width = statistics.shape
    shape = _Shape.of(x, groups)
    launch = shape.summed(x)
    partial = sums.new_empty((groups, launch.parts, 2 * shape.channels))
    with on(x):
        partial_sums[launch.grid(groups)](
            dy, second, x, kept, weight, bias, statistics, g, partial, shape.rows, shape.channels, launch.part_rows,
            width, eps, **launch.constants(), SECOND=second is not None, KEPT=kept is not None, RELU=relu,
            WRITE=stores_gradient(second, kept),
        )  # fmt: skip
        merge_sums[_blocks(shape.channels)](
            partial, statistics, sums, d_weight, d_bias, groups, launch.parts, shape.channels, width, eps, **MERGED
        )
    return outputs


def _differentiate(g, x, weight, bias, statistics, sums, relu, training, eps):
    dx = _new_like(x)
    groups, width = statistics.shape
    shape = _Shape.of(x, groups)
    launch = shape.mapped(x)
    with on(x):
        differentiate_rows[launch.grid(groups)](
            g, x, weight, bias, statistics, sums, dx, shape.rows, shape.channels, launch.part_rows, width, eps,
            **launch.constants(), RELU=relu, TRAINING=training,
        )  # fmt: skip
    return dx


for _name, _run, _fake in (
    ("statistics", _statistics, _new_statistics),
    ("merge", _merge, _new_merged),
    ("apply", _apply, _new_outputs),
    ("sums", _sums, _new_sums),
    ("differentiate", _differentiate, _new_dx),
):
    _library.impl(f"batch_norm_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pcl_fast::batch_norm_{_name}", _fake)

OPERATIONS = Operations(
    torch.ops.pcl_fast.batch_norm_statistics,
    torch.ops.pcl_fast.batch_norm_merge,
    torch.ops.pcl_fast.batch_norm_apply,
    torch.ops.pcl_fast.batch_norm_sums,
    torch.ops.pcl_fast.batch_norm_differentiate,
)


# --- launches -----------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """`parts` programs share a group's rows, `blocks` its channels.

    rows, columns: what the threads of a program take at a time, UNROLL times.
    """

    parts: int
    part_rows: int
    blocks: int
    rows: int
    columns: int

    def grid(self, groups: int) -> tuple[int, int, int]:
        return self.parts, self.blocks, groups

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": WARPS}


class _Shape(NamedTuple):
    """Of a group: rows and channels."""

    rows: int
    channels: int

    @classmethod
    def of(cls, x: torch.Tensor, groups: int) -> "_Shape":
        return cls(x.numel() // x.shape[1] // groups, x.shape[1])

    def summed(self, x: torch.Tensor) -> Launch:
        return divide(self.rows, self.channels, SUMMED, x.element_size(), multiprocessors(x.device))

    def mapped(self, x: torch.Tensor) -> Launch:
        return divide(self.rows, self.channels, MAPPED, x.element_size(), multiprocessors(x.device))


@lru_cache
def divide(rows: int, channels: int, columns: int, itemsize: int, multiprocessors: int) -> Launch:
    """Divide a group's rows among programs that fill the GPU once, each with equally many, and `columns` channels.

    A part has at least two tiles, for what a program reads and writes by channel to be little beside its rows.
    """
    columns = max(8, min(columns, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, columns)
    tile_rows = max(1, 32 * WARPS * 16 // itemsize // columns)  # of all threads' 16 bytes
    tiles = max(1, triton.cdiv(rows, UNROLL * tile_rows))
    parts = max(1, min(tiles // 2, multiprocessors * PROGRAMS // blocks))
    part_rows = triton.cdiv(tiles, parts) * UNROLL * tile_rows
    return Launch(max(1, triton.cdiv(rows, part_rows)), part_rows, blocks, tile_rows, columns)


def _blocks(channels: int) -> tuple[int, int]:
    return 1, triton.cdiv(channels, MERGED["COLUMNS"])


# --- bytes --------------------------------------------------------------------------------------------------------


def bytes_moved(
    rows: int,
    channels: int,
    itemsize: int,
    *,
    relu: bool = False,
    residual: bool = False,
    fork: bool = False,
    gradient: bool = True,
    multiprocessors: int,
) -> dict[str, int]:
    """Return how many bytes each kernel loads and stores in training, for [rows, channels] and float32 parameters,
    without a counter of batches, which is 16 bytes more of `merge_statistics`.

    Args:
        gradient: whether there is a backward pass.
        multiprocessors: of the GPU: the number of parts goes by it.
    """
    one = itemsize * rows * channels  # pass over the values
    words = 4 * -(-rows // UNROLL) * -(-channels // 8) if relu and residual else 0
    written = relu and residual
    summed = divide(rows, channels, SUMMED, itemsize, multiprocessors)
    mapped = divide(rows, channels, MAPPED, itemsize, multiprocessors)
    line, blocks = 4 * line_width(channels), _blocks(channels)[1]
    moved = {
        "partial_statistics": one + summed.parts * line,
        "merge_statistics": summed.parts * (8 * channels + 4 * blocks) + line + 16 * channels,
        "normalise_rows": (2 + residual) * one + words * gradient + mapped.parts * 16 * channels,
    }
    if gradient:
        moved |= {
            "partial_sums": (2 + fork + written) * one + words + summed.parts * 24 * channels,
            "merge_sums": summed.parts * 8 * channels + 20 * channels,
            "differentiate_rows": 3 * one + mapped.parts * (24 * channels + 4 * mapped.blocks),
        }
    return moved
