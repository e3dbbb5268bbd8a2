"""Negative prototypes, drawn as the first ids of a keyed permutation: the plain version of sampling.py."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

ROUNDS = 6  # of the permutation; must be the same as in sampling.py
MASK = 0xFFFFFFFF


def negative_columns(
    num_prototypes: int, num_negatives: int | None, positives: torch.Tensor, seed: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw distinct prototypes, uniformly from those that are nobody's positive.

    They are the first such ids of a keyed permutation. Nothing waits for the device: where fewer than r exist, the rest
    is masked and not left out.

    Args:
        num_prototypes: K.
        num_negatives: r, or None for all that exist.
        positives: int64 [N] in [0, K).
        seed: int or 0-d int64 tensor. The draw depends on it and on the other arguments alone, not on the device.

    Returns:
        ids: int64 [min(r, K)] on the device of `positives`.
        there: bool of the same shape, True for the ids that exist, which come first; None if all exist in any case.
    """
    height, width = grid(num_prototypes, num_negatives)
    cells = height * width
    wanted = num_prototypes if num_negatives is None else min(num_negatives, num_prototypes)
    holes = torch.arange(num_prototypes, cells, device=positives.device)
    excluded = unpermute(torch.cat([positives, holes]), height, width, seed).sort().values
    first = torch.ones_like(excluded, dtype=torch.bool)
    first[1:] = excluded[1:] != excluded[:-1]
    # The free id number j stands at position j + e if e excluded positions come before it. These are the excluded
    # positions that have at most j free ids before themselves. Repeated positions are moved behind all others.
    free_before = torch.where(first, excluded - (first.cumsum(0) - 1), cells).sort().values
    number = torch.arange(wanted, device=positives.device)
    position = number + torch.searchsorted(free_before, number, right=True)
    there = None if wanted + len(excluded) <= cells else position < cells
    ids = permute(position.clamp(max=cells - 1), height, width, seed)
    return (ids if there is None else ids.clamp(max=num_prototypes - 1)), there


@lru_cache
def grid(num_prototypes: int, num_negatives: int | None) -> tuple[int, int]:
    """Return (height, width) of the permutation's grid, which has at least K cells, hardly more, and is nearly square.

    With sides of at least 16, 6 rounds make pairs of ids uniform to some 1e-3 (the deviation falls with the cube of the
    side). Where all prototypes are taken they need no random order: the grid is one row, which the permutation rotates
    by a random amount.
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
    """Return the ids at int64 positions in [0, height * width), by a Feistel network on the grid's rows and columns."""
    row, column = position // width, position % width
    for i in range(0, ROUNDS, 2):
        row = _offset(column, _round_key(seed, i), height).add_(row).remainder_(height)
        column = _offset(row, _round_key(seed, i + 1), width).add_(column).remainder_(width)
    return row * width + column


def unpermute(ids: torch.Tensor, height: int, width: int, seed: int | torch.Tensor) -> torch.Tensor:
    """Return the positions of int64 ids: the inverse of `permute`."""
    row, column = ids // width, ids % width
    for i in reversed(range(0, ROUNDS, 2)):
        column = (column - _offset(row, _round_key(seed, i + 1), width)) % width
        row = (row - _offset(column, _round_key(seed, i), height)) % height
    return row * width + column


def _round_key(seed: int | torch.Tensor, i: int) -> int | torch.Tensor:
    """Return the 32-bit key of round i under a 64-bit seed."""
    return _mix(_mix((seed & MASK) ^ (0x9E3779B9 * (i + 1) & MASK)) ^ (seed >> 32 & MASK))


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    """Return a 32-bit hash, every bit of which depends on every bit of x."""
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def _offset(value: torch.Tensor, key: int | torch.Tensor, size: int) -> torch.Tensor:
    """Return a hash of values, in [0, size). It works in place because on a CPU fresh memory costs as much as the
    arithmetic.
    """
    value = value ^ key
    value *= 0x9E3779B1
    value &= MASK
    value ^= value >> 15
    value *= 0x85EBCA77
    value &= MASK
    value *= size
    value >>= 32
    return value
