"""Distributed Lloyd's algorithm, written so that several clusterings can take turns.

In each iteration every rank assigns its own points, and only the clusters' sums and counts and the number of changes
(k d + k + 1 floats) are added up over the ranks. Start, empty clusters and restarts are decided from numbers that are
the same on all ranks, so one rank or several give the same clustering up to rounding.

`lloyd` is a generator. It yields whenever sums are on their way between the ranks, and to the host, which must know
whether to go on. What the other clusterings enqueue in the meantime keeps the GPU busy.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pcl_fast.clustering.backends import Backend
from pcl_fast.clustering.splits import Split, drawn_by_size, split, widest
from pcl_fast.clustering.types import KMeansResult
from pcl_fast.distributed import all_reduce_sum, begin_all_reduce_sum, begin_to_read
from pcl_fast.seeds import mix_seeds

Result = TypeVar("Result")


class Shards(NamedTuple):
    """The points to cluster: this rank's `features` [n_local, d], and how many all ranks have, in rank order."""

    features: torch.Tensor
    lengths: list[int]
    group: dist.ProcessGroup | None


def take_turns(tasks: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Run the generators to their ends, in turns of one step each, and return what they return, in order."""
    results: dict[int, Result] = {}
    while len(results) < len(tasks):
        for number, task in enumerate(tasks):
            if number not in results:
                try:
                    next(task)
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(tasks))]


def lloyd(
    shards: Shards,
    k: int,
    backend: Backend,
    *,
    iterations: int,
    redo: int,
    seed: int,
    init: torch.Tensor | None,
    split_by: Split,
) -> Generator[None, None, KMeansResult]:
    """Yield between the steps of `kmeans`, and return its result. The arguments are those of `kmeans`, checked."""
    best: KMeansResult | None = None
    for start in range(redo):
        if init is None:
            centroids = draw_points(shards, k, seed + start)
        else:
            centroids = init.to(shards.features.device).clone(memory_format=torch.contiguous_format)
        result = yield from _descend(shards, centroids, backend, iterations, seed + start, split_by)
        if best is None or result.objective < best.objective:
            best = result
    return best


def _descend(
    shards: Shards, centroids: torch.Tensor, backend: Backend, iterations: int, seed: int, split_by: Split
) -> Generator[None, None, KMeansResult]:
    """Run Lloyd's iterations from these centroids, which are overwritten."""
    (k, d), features = centroids.shape, shards.features
    # Sums, counts and changes are one message between the ranks. float32 counts are exact up to 2^24 points a cluster,
    # and beyond that as exact as the sums.
    totals = centroids.new_empty(k * d + k + 1)
    sums, counts, changes = totals[: k * d].view(k, d), totals[k * d : -1], totals[-1:]
    assignment, nearest, splits = None, backend.begin_search(features, k), counts.int().zero_()
    for iteration in range(iterations):
        before, assignment = assignment, nearest(centroids)
        counts.copy_(backend.sums(features, assignment, k, sums)[1])
        changes.fill_(1) if before is None else changes.copy_((assignment != before).sum())
        wait = begin_all_reduce_sum(totals, shards.group)
        read = begin_to_read(lambda: torch.cat([changes > 0, (counts == 0).any()[None]]), wait, totals.device)
        yield
        changed, any_empty = read()
        if not (changed or any_empty):
            break  # these centroids are the means of their clusters already
        empty = counts == 0
        torch.where(empty[:, None], centroids, sums / counts[:, None].clamp(min=1), out=centroids)
        if any_empty:
            if split_by == "spread":
                spread = yield from _spread(shards, centroids, assignment, backend)
                donors = widest(spread, splits, int(empty.sum()))
            else:
                donors = drawn_by_size(counts, int(empty.sum()), mix_seeds(seed, iteration))
            split(centroids, empty, donors)
    else:
        assignment = nearest(centroids)
    return (yield from _label(shards, centroids, assignment))


def _spread(
    shards: Shards, centroids: torch.Tensor, assignment: torch.Tensor, backend: Backend
) -> Generator[None, None, torch.Tensor]:
    """Return the sums of squared distances to the centroids over the clusters' points of all ranks, [k]."""
    distance = squared_distance(shards.features, centroids, assignment)
    spread = backend.sums(distance[:, None], assignment, len(centroids))[0].view(-1)
    wait = begin_all_reduce_sum(spread, shards.group)
    yield
    wait()
    return spread


def _label(shards: Shards, centroids: torch.Tensor, assignment: torch.Tensor) -> Generator[None, None, KMeansResult]:
    """Return the result: distances to the assigned centroids, and their sum over all ranks."""
    distance = squared_distance(shards.features, centroids, assignment)
    objective = distance.sum(dtype=torch.float64)
    read = begin_to_read(lambda: objective, begin_all_reduce_sum(objective, shards.group), objective.device)
    yield
    return KMeansResult(centroids, assignment.int(), distance, read())


def draw_points(shards: Shards, k: int, seed: int) -> torch.Tensor:
    """Return k distinct points of all shards, [k, d] float32. They are chosen by their positions in the whole data set,
    so they are the same for any number of ranks.
    """
    features, lengths, group = shards
    rank = 0 if group is None else dist.get_rank(group)
    first = sum(lengths[:rank])
    chosen = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed))[:k]
    mine = ((chosen >= first) & (chosen < first + lengths[rank])).nonzero().view(-1)
    centroids = torch.zeros(k, features.shape[1], device=features.device)
    centroids[mine.to(features.device)] = features[(chosen[mine] - first).to(features.device)].float()
    return all_reduce_sum(centroids, group)


def squared_distance(features: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Return |x_i - c_assignment(i)|^2, [n] float32, computed in chunks that keep temporary tensors small.

    It is summed from differences, because |x|^2 + |c|^2 - 2 x.c would cancel.
    """
    chunk = max(1, (1 << 22) // features.shape[1])
    parts = [
        (rows - centroids[labels]).square_().sum(1)
        for rows, labels in zip(features.split(chunk), assignment.split(chunk), strict=True)
    ]
    return torch.cat(parts)
