"""Contrast of queries against several banks of negatives: loss and gradient in one pass over the banks.

Row i of N has, in every bank b, a positive p_i of weight w_i+ and negatives c_j of weight w_j (1 / temperature):

    s_i+ = w_i+ (q_i . p_i)      s_ij = w_j (q_i . c_j)      z_i = logsumexp_j s_ij - s_i+
    loss_i = softplus(z_i)       dloss_i/dq_i = sigmoid(z_i) (O_i - w_i+ p_i)      O_i = sum_j softmax_j(s_ij) w_j c_j

This is attention whose values are its keys, and it is computed like flash-decoding, for few rows and long banks. The
forward pass has three launches:

draw     Each program (block, set) writes its part of the list of a set's columns: ids and weights (sampling.py).
stream   Each program (part of a bank, tile of rows) goes through its columns once. It multiplies a tile of columns with
         the queries, turns the scores into exponentials against the running maximum, and multiplies these with the same
         columns again. It writes maximum, sum and numerator of the weighted mean: N d numbers per part, no logits.
combine  Each program (bank, row) rescales the parts, adds them in a fixed order, and finishes in residual form: z is
         computed as one difference, never 1 - softmax, so confident rows keep their gradient. One more program adds up
         the losses.

The backward pass is one launch: it adds up the banks' gradients, each times the upstream gradient of its loss. There
are no atomics, nothing is random and nothing waits for the GPU, so every run gives the same bits, and a CUDA graph can
hold it.

Banks. Bank 0 may be the queue: its positives are the rows of `key`, all its keys are negatives, and it has one
temperature. The other banks are prototype sets: the positive of a row is the prototype of its image; the negatives are
sampled prototypes that are nobody's positive, and the positives of the other rows, one column per row. A row's twins
(the rows that have the same prototype) add no negative for it.

Numerics. fp16 and bf16 operands are multiplied in the type that query and bank promote to, and added in fp32. fp32
queries are rounded to the type of a bank in half precision, which is no more exact than that, but their gradient is
fp32, so training need not round it. fp32 operands are split into two fp16 numbers, high + low, and multiplied as
high high + high low + low high: that keeps 22 bits, on the matrix units of every architecture, where TF32 has 11.
Matrix units truncate what they add to an accumulator; so that these errors do not pile up over a part, numerators are
added outside of them (except in half precision on Volta). On Hopper that also lets a product run beside other
instructions, which a scaled accumulator does not.
Exponentials times weights are scaled to at most 2^15 before they are rounded to fp16; otherwise a long tail of small
exponentials would be rounded to nothing. The scale follows the largest weight so far, a running maximum like that of
the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pcl_fast.kernels.combine import combine, weigh
from pcl_fast.kernels.launch import BLOCK_D, Tile, capability, divide, multiprocessors, tile_for
from pcl_fast.kernels.sampling import SLOTS, draw, halves
from pcl_fast.kernels.sampling_plain import grid
from pcl_fast.kernels.stream import stream
from pcl_fast.kernels.tiles import INTERPRETED, OLD_TRITON
from torch.autograd.function import once_differentiable

DRAW_BLOCK = 1024
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def widest(device: torch.device) -> int:
    """Return the largest d that the kernels take on a device; 0 where they cannot be used.

    Triton up to 3.1 supports Volta's matrix units, for which it cannot compile more than one block of d, but it fails
    to compile the fp32 kernels for Hopper. Later versions support the matrix units of Ampere and newer GPUs.

    Reports of fp16 products that are zero in part on Volta are open for Triton 2.2 and later (triton-lang/triton 3478
    and 4037). Compiled code has as many matrix instructions as these kernels' products need, but only a GPU can tell:
    run tests/kernels there before you trust them.
    """
    if INTERPRETED:
        return 4 * BLOCK_D
    if OLD_TRITON:
        return BLOCK_D if 70 <= capability(device) < 75 else 0
    return 4 * BLOCK_D if capability(device) >= 80 else 0


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels take features of this type: GPUs before Ampere have no bf16."""
    return dtype in TRITON_TYPES and (dtype != torch.bfloat16 or capability(device) >= 80)


def pays(bank: torch.dtype, device: torch.device) -> bool:
    """Return whether the kernels are expected to be faster than PyTorch for banks of this type: not for fp32 on Volta,
    where tiles of scores are so small that half of the warps repeat the others' products, until somebody measures it.
    """
    return bank != torch.float32 or capability(device) >= 80


class PrototypeBank(NamedTuple):
    """One granularity's centroids [K, d], concentration [K] and assignment [n] of integers, like clustering's
    PrototypeSet.
    """

    centroids: torch.Tensor
    concentration: torch.Tensor
    assignment: torch.Tensor


def contrast(
    query: torch.Tensor,
    key: torch.Tensor | None,
    queue: torch.Tensor | None,
    temperature: float,
    sets: Sequence[PrototypeBank],
    index: torch.Tensor | None,
    num_negatives: int | None,
    seed: int | torch.Tensor,
    batch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contrast the queries with the queue (unless it is None) and with every prototype set; the equations are above.

    Args:
        query: [N, d] float32, float16 or bfloat16, the only input that gets a gradient. Entries of float32 features
            (here and below) must be below 64 in absolute value; larger ones give NaN.
        key: [N, d], the queries' positives in the queue's bank; None without a queue.
        queue: [R, d] negatives, or None.
        temperature: tau of key and queue.
        sets: the prototype sets; set m draws its negatives with seed + m.
        index: int64 [N], positions of the rows' images in the assignments.
        num_negatives: r. If it is None, or more than exist, all are taken.
        seed: an int of 64 bits, or a 0-d int64 tensor on the device, which is read there.
        batch: int64 [B], positions of the images whose prototypes are columns and are not drawn, `index` among them;
            None where they are those of the rows.

    Returns:
        mean: 0-d float32, the queue's mean loss + the mean over the sets of their mean losses.
        loss: [B, N] float32, of the queue and the sets, in this order.
        correct: [B, N] bool, whether the positive scored strictly above every negative.
    """
    number, on_device = (0, seed) if isinstance(seed, torch.Tensor) else (seed, None)
    fields = [[bank[i] for bank in sets] for i in range(3)]
    return _Contrast.apply(query, key, queue, temperature, *fields, index, batch, num_negatives, number, on_device)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, queue, *rest):
        mean, loss, correct, gradient = torch.ops.pcl_fast.contrast(query, key, queue, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.has_queue = query.dtype, queue is not None
        ctx.mark_non_differentiable(correct)
        return mean, loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_mean, upstream_loss, _):
        (gradient,) = ctx.saved_tensors
        upstream = gradient, upstream_mean, upstream_loss
        return torch.ops.pcl_fast.contrast_backward(*upstream, ctx.has_queue, ctx.dtype), *[None] * 11


# --- operators ----------------------------------------------------------------------------------------------------
# torch.compile does not look into these. They are defined by Library and not by custom_op, whose checks cost 0.2 ms a
# call.

_library = torch.library.Library("pcl_fast", "DEF")
_library.define(
    "contrast(Tensor query, Tensor? key, Tensor? queue, float temperature, Tensor[] centroids, Tensor[] concentration, "
    "Tensor[] assignment, Tensor? index, Tensor? batch, int? num_negatives, SymInt seed, Tensor? device_seed) "
    "-> (Tensor mean, Tensor loss, Tensor correct, Tensor gradient)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "contrast_backward(Tensor gradient, Tensor? upstream_mean, Tensor? upstream_loss, bool has_queue, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _outputs(query, queue, centroids):
    n, d = query.shape
    banks = len(centroids) + (queue is not None)
    return (
        query.new_empty((), dtype=torch.float32),
        query.new_empty((banks, n), dtype=torch.float32),
        query.new_empty((banks, n), dtype=torch.bool),
        query.new_empty((banks, n, d), dtype=torch.float32),
    )


@torch.library.register_fake("pcl_fast::contrast")
def _fake_contrast(query, key, queue, temperature, centroids, *_):
    return _outputs(query, queue, centroids)


@torch.library.register_fake("pcl_fast::contrast_backward")
def _fake_backward(gradient, upstream_mean, upstream_loss, has_queue, dtype):
    return gradient.new_empty(gradient.shape[1:], dtype=dtype)


def _contrast(
    query, key, queue, temperature, centroids, concentration, assignment, index, batch, num_negatives, seed, device_seed
):
    query, n, d = query.contiguous(), *query.shape
    outputs = mean, loss, correct, gradient = _outputs(query, queue, centroids)
    index = query.new_empty(0, dtype=torch.int64) if index is None else index.contiguous()
    batch = index if batch is None else batch.contiguous()
    sets = [
        _set(*fields, len(batch), num_negatives) for fields in zip(centroids, concentration, assignment, strict=True)
    ]
    banks = sets if queue is None else [_queue(key, queue, sets), *sets]
    launches = _plan(query, banks)
    parts = sum(sum(launch.parts) for launch in launches)
    state = _State(
        *query.new_empty((2, parts, n), dtype=torch.float32),
        query.new_empty((parts, n, d), dtype=torch.float32),
        torch.empty_like(loss),
        torch.empty_like(gradient),
        query.new_empty(len(banks), dtype=torch.int32),
    )
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        for launch in launches:
            lists = _draw(launch, batch, len(sets) - len(banks), seed, device_seed)
            _stream(launch, query, index, lists, temperature, state)
        combine[(len(banks) * n + 1,)](
            *state, loss, correct.view(torch.uint8), gradient, mean, n, len(banks),
            *_shares(queue is not None, len(banks), n), D=d, BLOCK_D=_padded(d), PARTS=parts_at_once(_padded(d)),
        )  # fmt: skip
    return outputs


def _backward(gradient, upstream_mean, upstream_loss, has_queue, dtype):
    banks, n, d = gradient.shape
    out = gradient.new_empty((n, d), dtype=dtype)
    strides = (0, 0) if upstream_loss is None else upstream_loss.stride()
    with torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext():
        weigh[(n,)](
            gradient, upstream_mean, upstream_loss, out, n, banks, *strides, *_shares(has_queue, banks, n),
            D=d, BLOCK_D=_padded(d), MEAN=upstream_mean is not None, BY_ROW=upstream_loss is not None,
        )  # fmt: skip
    return out


_library.impl("contrast", _contrast, "CompositeExplicitAutograd")
_library.impl("contrast_backward", _backward, "CompositeExplicitAutograd")


# --- launches -----------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """What `stream` writes for `combine`: per part and row, maxima and sums [P, N] and numerators [P, N, d]; per bank
    and row, scores s+ [B, N] and positives w+ p [B, N, d]; and in ends [B] each bank's last part, plus one.
    """

    maxima: torch.Tensor
    sums: torch.Tensor
    numerators: torch.Tensor
    scores: torch.Tensor
    positives: torch.Tensor
    ends: torch.Tensor


class _Bank(NamedTuple):
    """A bank of negatives, with its rows [size, d], and how many columns a query meets in it.

    concentration, assignment: see `PrototypeBank`; key: the positives of the queue, None in a prototype set.
    columns: how many positions of the permutation's grid (height x width, see sampling.py) are listed.
    length: how many columns the list has in all.
    """

    rows: torch.Tensor
    concentration: torch.Tensor
    assignment: torch.Tensor
    key: torch.Tensor | None
    size: int
    columns: int
    height: int
    width: int
    length: int

    def types(self) -> tuple:
        """Return the types of the bank's tensors, in which all banks of a launch must agree: a kernel is compiled for
        the types of its pointers.
        """
        return self.rows.dtype, self.concentration.dtype, self.assignment.dtype


class _Launch(NamedTuple):
    """Up to SLOTS banks of the same types that share a launch; they are numbered from `first_bank`, and their parts
    from `first_part`.
    """

    banks: list[_Bank]
    first_bank: int
    first_part: int
    parts: list[int]
    part_columns: int
    operand: torch.dtype
    tile: Tile

    def each(self, field: str) -> list:
        """Return the field of every bank, and the last bank's again for each slot that is not used."""
        return self.fill([getattr(bank, field) for bank in self.banks])

    def fill(self, values: list) -> list:
        return [*values, *[values[-1]] * (SLOTS - len(values))]


def _queue(key: torch.Tensor, queue: torch.Tensor, sets: list[_Bank]) -> _Bank:
    # The queue has no concentration and no assignment. They are never read, and only need the types of the sets'.
    concentration = sets[0].concentration if sets else queue.new_empty(0, dtype=torch.float32)
    assignment = sets[0].assignment if sets else queue.new_empty(0, dtype=torch.int32)
    size = len(queue)
    return _Bank(queue.contiguous(), concentration, assignment, key.contiguous(), size, size, 1, size, size)


def _set(centroids, concentration, assignment, n: int, num_negatives: int | None) -> _Bank:
    size = len(centroids)
    height, width = grid(size, num_negatives)
    columns = size if num_negatives is None else min(num_negatives, size)
    length = n + height * width - size + columns
    tensors = centroids.contiguous(), concentration.contiguous(), assignment.contiguous()
    return _Bank(*tensors, None, size, columns, height, width, length)


def _plan(query: torch.Tensor, banks: list[_Bank]) -> list[_Launch]:
    """Divide the banks into launches: one for all, unless there are more than SLOTS or their types differ."""
    n, d = query.shape
    groups: list[list[_Bank]] = []
    for bank in banks:
        if groups and len(groups[-1]) < SLOTS and groups[-1][0].types() == bank.types():
            groups[-1].append(bank)
        else:
            groups.append([bank])
    launches: list[_Launch] = []
    first_bank = first_part = 0
    for group in groups:
        operand = _operand_type(query, group)
        tile = tile_for(capability(query.device), operand.itemsize, d)
        programs = multiprocessors(query.device) * tile.programs
        programs //= triton.cdiv(n, tile.rows) * triton.cdiv(d, BLOCK_D)
        part_columns, parts = divide(tuple(bank.length for bank in group), tile.columns, max(1, programs))
        launches.append(_Launch(group, first_bank, first_part, parts, part_columns, operand, tile))
        first_bank, first_part = first_bank + len(group), first_part + sum(parts)
    return launches


def _operand_type(query: torch.Tensor, group: list[_Bank]) -> torch.dtype:
    """Return the type in which a launch multiplies: what all types promote to, except that a query in fp32 is rounded
    to the type of the others.
    """
    operand = group[0].rows.dtype
    if group[0].key is not None:
        operand = torch.promote_types(operand, group[0].key.dtype)
    return operand if query.dtype == torch.float32 else torch.promote_types(operand, query.dtype)


def _draw(
    launch: _Launch, index: torch.Tensor, first_set: int, seed: int, device_seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """List the columns of the launch's sets for the images `index`, int64 [n]: return ids and weights [sets, stride],
    and stride. Bank b is set b + first_set.
    """
    n = len(index)
    sets = [bank for bank in launch.banks if bank.key is None]
    stride = max((bank.length for bank in sets), default=0)
    ids = index.new_empty((len(sets), stride), dtype=torch.int32)
    weights = index.new_empty((len(sets), stride), dtype=torch.float32)
    if not sets:
        return ids, weights, stride
    batch = triton.next_power_of_2(max(n + bank.height * bank.width - bank.size for bank in sets))
    slots = launch._replace(banks=sets)
    draw[(1 + triton.cdiv(max(bank.columns for bank in sets), DRAW_BLOCK), len(sets))](
        index, *slots.each("assignment"), *slots.each("concentration"), *slots.each("size"), *slots.each("columns"),
        *slots.each("height"), *slots.each("width"), device_seed, *halves(seed),
        launch.first_bank + len(launch.banks) - len(sets) + first_set, ids, weights, n, stride,
        USED=len(sets), SEEDED=device_seed is not None, BLOCK=DRAW_BLOCK, EXCLUDED=batch,
        CHUNK=chunk(n, batch),
    )  # fmt: skip
    return ids, weights, stride


def _stream(
    launch: _Launch, query: torch.Tensor, index: torch.Tensor, lists: tuple, temperature: float, state: _State
) -> None:
    n, d = query.shape
    ids, weights, stride = lists
    key = launch.banks[0].key
    tile, operand = launch.tile, TRITON_TYPES[launch.operand]
    begins = [0, *accumulate(launch.parts)][: len(launch.parts)]
    block_d = min(_padded(d), BLOCK_D)
    stream[(sum(launch.parts) * triton.cdiv(n, tile.rows), triton.cdiv(d, block_d))](
        query, query if key is None else key, index,
        *launch.each("rows"), *launch.each("concentration"), *launch.each("assignment"), *launch.each("length"),
        *launch.fill(begins), ids, weights, 1 / temperature, *state,
        n, stride, launch.first_bank, launch.first_part, launch.part_columns,
        D=d, BLOCK_D=block_d, ROWS=tile.rows, COLUMNS=tile.columns, USED=len(launch.banks), QUEUE=key is not None,
        OPERAND=operand, DOT=tl.float32 if INTERPRETED and operand == tl.bfloat16 else operand,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _shares(has_queue: bool, banks: int, n: int) -> tuple[float, float]:
    """Return the weights in `mean` of a row's loss: its loss in the first bank, and in each of the others."""
    of_sets = 1 / (max(1, banks - has_queue) * n)
    return 1 / n if has_queue else of_sets, of_sets


def chunk(n: int, batch: int) -> int:
    """Return how many rows `draw` compares with a whole batch of columns at once, in tiles of some 4096 pairs."""
    return max(1, min(triton.next_power_of_2(n), 4096 // batch))


def parts_at_once(width: int) -> int:
    """Return how many parts of a row `combine` adds up at once, in tiles of 4096 numbers."""
    return max(4, 4096 // width)


def _padded(d: int) -> int:
    """Return the width of the tiles for rows of d: the next power of 2, but no less than the matrix units need."""
    return max(16, triton.next_power_of_2(d))
