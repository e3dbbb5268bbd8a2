"""Contrast of queries against one positive each and a bank of negatives: the plain twin of the fused kernels.

The loss of row i is the cross-entropy of its positive among positive and negatives,

    s_i+ = w_i+ (q_i . p_i)        s_ij = w_j (q_i . c_j)
    loss_i = -log(exp s_i+ / (exp s_i+ + sum_j exp s_ij))

computed in residual form, z_i = logsumexp_j s_ij - s_i+ and loss_i = softplus(z_i). Its gradient sigmoid(z_i) is exact
for confident rows too, where 1 - softmax would have cancelled to nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

ROUNDS = 6  # of the permutation; sampling.py has the same
MASK = 0xFFFFFFFF


def contrast(
    query: torch.Tensor,
    positive: torch.Tensor,
    positive_weight: torch.Tensor | float,
    bank: torch.Tensor,
    bank_weight: torch.Tensor | float,
    hidden: torch.Tensor | None = None,
    there: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every query's positive against the bank.

    Args:
        query: [N, d], the only input that gets a gradient.
        positive: [N, d], each query's own.
        positive_weight: [N] or scalar, 1 / temperature of the positives.
        bank: [R, d] negatives, shared by all queries; R may be 0.
        bank_weight: [R] or scalar, 1 / temperature of each negative.
        hidden: [N, H] bool with H <= R, True where column j < H is no negative of row i.
        there: [C] bool with C <= R, False where one of the last C columns is nobody's negative.

    Inputs are brought to float32 (float64 if query is) before anything is multiplied.

    Returns:
        (loss [N] in that dtype, correct [N] bool). correct: the positive scores strictly above every negative, so that
        a collapsed encoder, whose scores are all equal, gets none right. A row without negatives has loss 0 and is
        correct.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype)
    score = (query * positive.detach().to(dtype)).sum(1) * positive_weight
    scores = (query @ bank.detach().to(dtype).T) * bank_weight
    if hidden is not None:
        scores[:, : hidden.shape[1]].masked_fill_(hidden, -torch.inf)
    if there is not None:
        scores[:, len(bank) - len(there) :].masked_fill_(~there, -torch.inf)
    if not len(bank):
        return score * 0, torch.ones_like(score, dtype=torch.bool)
    largest = scores.detach().amax(1)
    # A row whose negatives are all hidden has largest = -inf; the clamp keeps -inf - -inf out of its sum, which is
    # then 0, and z is -inf. What flows back into hidden scores is dropped, so its gradient is 0 and not 0/0.
    shift = largest.clamp(min=-1e30)
    total = (scores - shift[:, None]).exp().sum(1)
    # Above its threshold softplus is linear: at 40 the difference is below the resolution of float64 too.
    return F.softplus((shift - score) + total.log(), threshold=40), score.detach() > largest


def negative_columns(
    num_prototypes: int, num_negatives: int | None, positives: torch.Tensor, seed: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Distinct prototypes, uniform over those that are nobody's positive: the first of a keyed permutation.

    Nothing waits for the device: what is not there is masked instead of left out.

    Args:
        num_prototypes: K.
        num_negatives: r, or None for all there are.
        positives: int64 [N] in [0, K).
        seed: int or 0-d int64 tensor. The draw depends on nothing but it and the other arguments, on any device.

    Returns:
        ids: int64 [min(r, K)] on the device of `positives`.
        there: bool, of the same shape, True for a beginning of it: the ids that exist. None if all do in any case.
    """
    height, width = grid(num_prototypes, num_negatives)
    cells = height * width
    wanted = num_prototypes if num_negatives is None else min(num_negatives, num_prototypes)
    holes = torch.arange(num_prototypes, cells, device=positives.device)
    excluded = unpermute(torch.cat([positives, holes]), height, width, seed).sort().values
    first = torch.ones_like(excluded, dtype=torch.bool)
    first[1:] = excluded[1:] != excluded[:-1]
    # The free id number j is at position j + e if e excluded positions come before it: those, in order, whose own
    # number of free ids before them is j or less. Repeated ones are moved out of the way.
    free_before = torch.where(first, excluded - (first.cumsum(0) - 1), cells).sort().values
    number = torch.arange(wanted, device=positives.device)
    position = number + torch.searchsorted(free_before, number, right=True)
    there = None if wanted + len(excluded) <= cells else position < cells
    ids = permute(position.clamp(max=cells - 1), height, width, seed)
    return (ids if there is None else ids.clamp(max=num_prototypes - 1)), there


@lru_cache
def grid(num_prototypes: int, num_negatives: int | None) -> tuple[int, int]:
    """(height, width) of the permutation's grid: at least K cells, nearly square, and hardly any more than K.

    A side of at least 16 makes 6 rounds enough for pairs of ids to be uniform to some 1e-3 (the deviation falls with
    the cube of the side). All prototypes need no random order: one row, which is then turned by a random amount.
    """
    if num_negatives is None or num_negatives >= num_prototypes:
        return 1, num_prototypes
    side = max(16, math.isqrt(num_prototypes - 1) + 1)
    height, width = side, side
    for candidate in range(side, max(16, side * 3 // 4) - 1, -1):
        columns = max(16, -(-num_prototypes // candidate))
        if candidate * columns < height * width:
            height, width = candidate, columns
    return height, width


def permute(position: torch.Tensor, height: int, width: int, seed: int | torch.Tensor) -> torch.Tensor:
    """Ids at int64 positions in [0, height * width): a Feistel network on the grid's rows and columns."""
    row, column = position // width, position % width
    for i in range(0, ROUNDS, 2):
        row = _offset(column, _round_key(seed, i), height).add_(row).remainder_(height)
        column = _offset(row, _round_key(seed, i + 1), width).add_(column).remainder_(width)
    return row * width + column


def unpermute(ids: torch.Tensor, height: int, width: int, seed: int | torch.Tensor) -> torch.Tensor:
    """Positions of int64 ids, the inverse of `permute`."""
    row, column = ids // width, ids % width
    for i in reversed(range(0, ROUNDS, 2)):
        column = (column - _offset(row, _round_key(seed, i + 1), width)) % width
        row = (row - _offset(column, _round_key(seed, i), height)) % height
    return row * width + column


def _round_key(seed: int | torch.Tensor, i: int) -> int | torch.Tensor:
    """32 bits from a 64-bit seed."""
    return _mix(_mix((seed & MASK) ^ (0x9E3779B9 * (i + 1) & MASK)) ^ (seed >> 32 & MASK))


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    """Hash of 32 bits in which every bit of the result depends on every bit of x."""
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def _offset(value: torch.Tensor, key: int | torch.Tensor, size: int) -> torch.Tensor:
    """Hash of values to [0, size). In place where it can be: on a CPU, fresh memory costs as much as the arithmetic."""
    value = value ^ key
    value *= 0x9E3779B1
    value &= MASK
    value ^= value >> 15
    value *= 0x85EBCA77
    value &= MASK
    value *= size
    value >>= 32
    return value


# What follows is the loss as the paper and the official code define it, row by row in Python and float64: slow on
# purpose, sharing nothing with what it is compared with, for tests only.


def info_nce_rows(query, key, queue, temperature) -> list[float]:
    """-log softmax of q.k'/tau among itself and q.(every queue key)/tau, per row."""
    losses = []
    for i in range(len(query)):
        logits = [_dot(query[i], key[i]) / temperature]
        logits += [_dot(query[i], queue[j]) / temperature for j in range(len(queue))]
        losses.append(_cross_entropy(logits))
    return losses


def proto_nce_rows(query, centroids, concentration, positives, negatives) -> list[float]:
    """Per row: its own prototype, against the other rows' prototypes and the sampled ones, each over its own phi.

    Another row contributes a column even if a third row shares its prototype; a row whose prototype is this row's own
    contributes none.
    """
    losses = []
    for i in range(len(query)):
        own = int(positives[i])
        columns = [own]
        columns += [int(positives[j]) for j in range(len(query)) if int(positives[j]) != own]
        columns += [int(c) for c in negatives]
        losses.append(_cross_entropy([_dot(query[i], centroids[c]) / float(concentration[c]) for c in columns]))
    return losses


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def _cross_entropy(logits: list[float]) -> float:
    """-log softmax(logits)[0]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[0]
