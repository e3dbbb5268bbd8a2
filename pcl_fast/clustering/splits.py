"""What k-means does about clusters that have become empty: each takes half of another."""

from __future__ import annotations

from typing import Literal

import torch

Split = Literal["spread", "size"]
# The two halves of a cluster are moved apart by this factor, as in faiss.
_SHIFT = 1 / 1024


def widest(spread: torch.Tensor, splits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the clusters with the largest sums of squared distances to their centroids, at most
    `count`.

    Args:
        spread: [k], those sums.
        splits: [k], how often each was split before, which is brought up to date. A sum counts half for every time, as
            a split can fail: of equal points, or along coordinates that are 0.
    """
    weight = spread * 0.5**splits
    chosen = weight.sort(descending=True, stable=True).indices[: min(count, int((weight > 0).sum()))]
    splits[chosen] += 1
    return chosen


def drawn_by_size(counts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return the indices of different clusters that are drawn, as in faiss, with a chance proportional to their number
    of points beyond the first, at most `count`.
    """
    weight = (counts - 1).clamp(min=0).double().cpu()
    draws = min(count, int((weight > 0).sum()))
    if not draws:
        return torch.empty(0, dtype=torch.int64, device=counts.device)
    return torch.multinomial(weight, draws, generator=torch.Generator().manual_seed(seed)).to(counts.device)


def split(centroids: torch.Tensor, empty: torch.Tensor, donors: torch.Tensor) -> None:
    """Give each of the empty clusters half of a donor, in place: both get the donor's centroid, shifted to either side.

    Args:
        centroids: [k, d].
        empty: [k] bool. If there are fewer donors, the rest stay empty.
        donors: indices of different clusters, at most one for every empty one.
    """
    empty = empty.nonzero().view(-1)[: len(donors)]
    shift = torch.full((centroids.shape[1],), 1 + _SHIFT, device=centroids.device)
    shift[1::2] = 1 - _SHIFT
    centroids[empty] = centroids[donors] * shift
    centroids[donors] = centroids[donors] * (2 - shift)
