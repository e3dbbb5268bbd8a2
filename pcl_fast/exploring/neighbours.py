"""The nearest of many unit vectors, a block of comparisons at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

# How many comparisons are held at once: 256 MB of float32.
_HELD = 1 << 26


class Nearest(NamedTuple):
    """What is nearest to every query, the nearest first.

    index: int64 [n, count], positions among the keys.
    distance: float32 [n, count], Euclidean; of unit vectors sqrt(2 - 2 cos).
    """

    index: np.ndarray
    distance: np.ndarray


@torch.inference_mode()
def nearest(
    queries: torch.Tensor,
    keys: torch.Tensor,
    count: int,
    *,
    not_itself: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Nearest:
    """Find the keys that are nearest to every query.

    Args:
        queries, keys: float32 [n, d] and [m, d] of unit length, on one device.
        count: how many; of fewer keys all.
        not_itself: queries and keys are the same points, of which none counts as its own neighbour.
        progress: is told how many queries are done.
    """
    count = min(count, len(keys) - not_itself)
    index = np.zeros((len(queries), count), np.int64)
    distance = np.zeros((len(queries), count), np.float32)
    rows = max(1, _HELD // len(keys))
    for begin in range(0, len(queries), rows):
        block = queries[begin : begin + rows]
        cosine = block @ keys.T
        if not_itself:
            at = torch.arange(len(block), device=block.device)
            cosine[at, at + begin] = -torch.inf
        best = cosine.topk(count, dim=1)
        end = begin + len(block)
        index[begin:end] = best.indices.cpu().numpy()
        distance[begin:end] = (2 - 2 * best.values).clamp(min=0).sqrt().cpu().numpy()
        progress(end)
    return Nearest(index, distance)
