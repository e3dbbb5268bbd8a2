"""Negative prototypes, drawn by the first ids of a keyed permutation: the plain version of sampling.py."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

ROUNDS = 6  # of the permutation; sampling.py has the same
MASK = 0xFFFFFFFF


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
