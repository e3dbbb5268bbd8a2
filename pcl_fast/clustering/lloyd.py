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
import torch.nn.functional as F

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


class Options(NamedTuple):
    """What a user chooses of k-means, see `kmeans`."""

    iterations: int
    redo: int
    split_by: Split
    prune_after: int | None
    spherical: bool = False


def lloyd(
    shards: Shards, k: int, backend: Backend, *, seed: int, init: torch.Tensor | None, options: Options
) -> Generator[None, None, KMeansResult]:
    """Yield between the steps of `kmeans`, and return its result. The arguments are those of `kmeans`, checked."""
    first = options.prune_after or options.iterations
    best: _Descent | None = None
    for start in range(options.redo):
        if init is None:
            centroids = draw_points(shards, k, seed + start)
        else:
            centroids = init.to(shards.features.device).clone(memory_format=torch.contiguous_format)
        descent = _Descent(shards, centroids, backend, seed + start, options)
        yield from descent.go_on(first)
        if best is None or descent.objective < best.objective:
            best = descent
    yield from best.go_on(options.iterations)
    return best.result()


class _Descent:
    """Lloyd's iterations from one start. It can be interrupted after some of them, and goes on to the same bits.

    objective: of the clusters as they are, once `go_on` has returned.
    """

    def __init__(self, shards: Shards, centroids: torch.Tensor, backend: Backend, seed: int, options: Options):
        """centroids: those to start from, which are overwritten."""
        self._shards, self._centroids, self._backend, self._options = shards, centroids, backend, options
        self._seed = seed
        if options.spherical:
            self._to_unit_length(centroids)
        k, d = centroids.shape
        # Sums, counts and changes are one message between the ranks. float32 counts are exact up to 2^24 points a
        # cluster, and beyond that as exact as the sums.
        self._totals = centroids.new_empty(k * d + k + 1)
        self._splits = centroids.new_zeros(k, dtype=torch.int32)
        self._nearest = backend.begin_search(shards.features, k)
        self._assignment: torch.Tensor | None = None
        self._done, self._has_ended = 0, False

    def go_on(self, iterations: int) -> Generator[None, None, None]:
        """Yield between the steps, until so many iterations are done, fewer if no assignment changes any more."""
        if self._has_ended:
            return
        while self._done < min(iterations, self._options.iterations) and not self._has_ended:
            yield from self._iterate()
            self._done += 1
        if self._done == self._options.iterations and not self._has_ended:
            self._assignment, self._has_ended = self._nearest(self._centroids), True
        if self._has_ended:
            self._nearest = None  # which holds memory
        yield from self._measure()

    def _iterate(self) -> Generator[None, None, None]:
        (k, d), features = self._centroids.shape, self._shards.features
        sums, counts, changes = self._totals[: k * d].view(k, d), self._totals[k * d : -1], self._totals[-1:]
        before, self._assignment = self._assignment, self._nearest(self._centroids)
        counts.copy_(self._backend.sums(features, self._assignment, k, sums)[1])
        changes.fill_(1) if before is None else changes.copy_((self._assignment != before).sum())
        wait = begin_all_reduce_sum(self._totals, self._shards.group)
        read = begin_to_read(lambda: torch.cat([changes > 0, (counts == 0).any()[None]]), wait, self._totals.device)
        yield
        changed, any_empty = read()
        if not (changed or any_empty):
            self._has_ended = True  # these centroids are the means of their clusters already
            return
        empty = counts == 0
        means = sums / counts[:, None].clamp(min=1)
        if self._options.spherical:
            means = self._to_unit_length(means)
        torch.where(empty[:, None], self._centroids, means, out=self._centroids)
        if any_empty:
            yield from self._fill(empty, counts)
            if self._options.spherical:
                self._to_unit_length(self._centroids)

    def _to_unit_length(self, rows: torch.Tensor) -> torch.Tensor:
        """Scale [k, d] to unit length, in place. Where points cancel to 0 all unit vectors are equally good: the
        centroid stays.
        """
        zero = ~rows.any(1, keepdim=True)
        return torch.where(zero, self._centroids, F.normalize(rows, dim=1), out=rows)

    def _fill(self, empty: torch.Tensor, counts: torch.Tensor) -> Generator[None, None, None]:
        """Give empty clusters a half of others."""
        wanted = int(empty.sum())
        if self._options.split_by == "spread":
            distance = self._squared_distance()[:, None]
            spread = self._backend.sums(distance, self._assignment, len(counts))[0].view(-1)
            wait = begin_all_reduce_sum(spread, self._shards.group)
            yield
            wait()
            donors = widest(spread, self._splits, wanted)
        else:
            donors = drawn_by_size(counts, wanted, mix_seeds(self._seed, self._done))
        split(self._centroids, empty, donors)

    def _squared_distance(self) -> torch.Tensor:
        return squared_distance(self._shards.features, self._centroids, self._assignment)

    def _measure(self) -> Generator[None, None, None]:
        """Find the distances to the assigned centroids, and their sum over all ranks."""
        self._distance = self._squared_distance()
        objective = self._distance.sum(dtype=torch.float64)
        wait = begin_all_reduce_sum(objective, self._shards.group)
        read = begin_to_read(lambda: objective, wait, objective.device)
        yield
        self.objective = read()

    def result(self) -> KMeansResult:
        return KMeansResult(self._centroids, self._assignment.int(), self._distance, self.objective)


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
